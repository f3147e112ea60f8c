"""When captures go: `ttlSecondsAfterFinished` after their end, as a Job does, and their files with them."""

from datetime import datetime, timedelta

from api.packetcapture import PacketCapture
from controller.quota import Admission


def goes_at(capture: PacketCapture, admission: Admission) -> datetime | None:
    """When the capture is to be deleted; None when it stays.

    A capture without a fitting stamp never began, so it never finishes, and stays for its maker to read why.
    """
    ttl = capture.spec.ttl_seconds_after_finished
    if ttl is None or admission.ends is None:
        return None
    return admission.ends + timedelta(seconds=ttl)
