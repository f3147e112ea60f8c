# syntax=docker/dockerfile:1
# Written by `hack/images dockerfile` from hack/images.toml: change that. A test compares them.
# docker build --target agent --tag kubepcap.invalid/agent:dev .

FROM debian:bookworm-slim AS build-python
RUN apt-get update && apt-get install --yes --no-install-recommends mmdebstrap python3-pip
RUN mmdebstrap \
    --mode=root \
    --variant=extract \
    --include=python3.11-minimal,libpython3.11-stdlib,libpcap0.8 \
    '--dpkgopt=path-exclude=/usr/share/doc/*' \
    '--dpkgopt=path-exclude=/usr/share/man/*' \
    '--dpkgopt=path-exclude=/usr/share/locale/*' \
    '--dpkgopt=path-exclude=/usr/share/info/*' \
    '--dpkgopt=path-exclude=/usr/share/lintian/*' \
    '--dpkgopt=path-include=/usr/share/doc/*/copyright' \
    bookworm \
    /rootfs
RUN sh -euc 'ln -s python3.11 "$1/usr/bin/python3" && \
    printf "root:x:0:0::/:/nonexistent\nkubepcap:x:65532:65532::/:/nonexistent\n" > "$1/etc/passwd" && \
    printf "root:x:0:\nkubepcap:x:65532:\n" > "$1/etc/group" && \
    mkdir -p "$1/app" "$1/proc" "$1/sys" "$1/run" "$1/tmp" && \
    chmod 1777 "$1/tmp" && \
    rm -rf "$1/bin/tar" "$1/sbin" "$1/usr/sbin" "$1/usr/bin/dpkg"* "$1/usr/bin/update-alternatives" "$1/etc/apt" "$1/etc/dpkg" "$1/etc/cron.daily" "$1/usr/share/dpkg" "$1/usr/share/perl5" "$1/usr/share/polkit-1" && \
    cd "$1/usr/lib/python3.11" && \
    rm -rf ensurepip idlelib lib2to3 pydoc_data turtledemo && \
    cd "$1" && \
    rm -rf var/log/*.log var/log/apt var/cache/ldconfig etc/machine-id etc/resolv.conf etc/hostname' setup /rootfs
RUN chroot /rootfs python3 -m compileall -q -f -j 1 --invalidation-mode=unchecked-hash /usr/lib/python3.11
COPY hack/requirements/servers.txt /requirements.txt
RUN pip \
    install \
    --quiet \
    --disable-pip-version-check \
    --no-compile \
    --no-deps \
    --require-hashes \
    --only-binary=:all: \
    --implementation=cp \
    --python-version=3.11 \
    --abi=cp311 \
    --abi=abi3 \
    --abi=none \
    "--platform=manylinux_2_36_$(uname -m)" \
    "--platform=manylinux_2_35_$(uname -m)" \
    "--platform=manylinux_2_34_$(uname -m)" \
    "--platform=manylinux_2_31_$(uname -m)" \
    "--platform=manylinux_2_28_$(uname -m)" \
    "--platform=manylinux_2_26_$(uname -m)" \
    "--platform=manylinux_2_24_$(uname -m)" \
    "--platform=manylinux_2_17_$(uname -m)" \
    "--platform=manylinux_2_12_$(uname -m)" \
    "--platform=manylinux_2_5_$(uname -m)" \
    "--platform=manylinux2014_$(uname -m)" \
    --requirement=/requirements.txt \
    --target=/rootfs/app/site-packages && rm -rf /rootfs/app/site-packages/bin
RUN chroot /rootfs python3 -m compileall -q -f -j 1 --invalidation-mode=unchecked-hash /app/site-packages

FROM scratch AS base-python
COPY --from=build-python /rootfs /
ENV PATH=/usr/bin
ENV PYTHONDONTWRITEBYTECODE=1
ENV PYTHONPATH=/app/site-packages
ENV PYTHONUNBUFFERED=1
WORKDIR /app

FROM debian:bookworm-slim AS build-tools
RUN apt-get update && apt-get install --yes --no-install-recommends mmdebstrap
RUN mmdebstrap \
    --mode=root \
    --variant=essential \
    --include=bash,curl,dnsutils,iproute2,iputils-ping,netcat-openbsd,nginx-light,procps,python3-minimal,tcpdump \
    '--dpkgopt=path-exclude=/usr/share/doc/*' \
    '--dpkgopt=path-exclude=/usr/share/man/*' \
    '--dpkgopt=path-exclude=/usr/share/locale/*' \
    '--dpkgopt=path-exclude=/usr/share/info/*' \
    '--dpkgopt=path-exclude=/usr/share/lintian/*' \
    '--dpkgopt=path-include=/usr/share/doc/*/copyright' \
    bookworm \
    /rootfs
RUN sh -euc 'ln -sf /dev/stdout "$1/var/log/nginx/access.log" && \
    ln -sf /dev/stderr "$1/var/log/nginx/error.log" && \
    cd "$1" && \
    rm -rf var/log/*.log var/log/apt var/cache/ldconfig etc/machine-id etc/resolv.conf etc/hostname' setup /rootfs

FROM scratch AS base-tools
COPY --from=build-tools /rootfs /
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
WORKDIR /

FROM base-python AS apiserver
COPY api /app/api
COPY kube /app/kube
COPY apiserver /app/apiserver
RUN ["python3", "-m", "compileall", "-q", "-f", "-j", "1", "--invalidation-mode=unchecked-hash", "/app/api", "/app/kube", "/app/apiserver"]
USER 65532:65532
CMD ["python3", "-m", "apiserver"]

FROM base-python AS webhook
COPY api /app/api
COPY kube /app/kube
COPY webhook /app/webhook
RUN ["python3", "-m", "compileall", "-q", "-f", "-j", "1", "--invalidation-mode=unchecked-hash", "/app/api", "/app/kube", "/app/webhook"]
USER 65532:65532
CMD ["python3", "-m", "webhook"]

FROM base-python AS controller
COPY api /app/api
COPY kube /app/kube
COPY controller /app/controller
RUN ["python3", "-m", "compileall", "-q", "-f", "-j", "1", "--invalidation-mode=unchecked-hash", "/app/api", "/app/kube", "/app/controller"]
USER 65532:65532
CMD ["python3", "-m", "controller"]

FROM base-python AS agent
COPY api /app/api
COPY kube /app/kube
COPY agent /app/agent
RUN ["python3", "-m", "compileall", "-q", "-f", "-j", "1", "--invalidation-mode=unchecked-hash", "/app/api", "/app/kube", "/app/agent"]
USER 65532:65532
CMD ["python3", "-m", "agent"]

FROM base-tools AS tools
USER 0:0
CMD ["sleep", "infinity"]
