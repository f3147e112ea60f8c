/* Sends numbered UDP packets through one interface at a steady rate, and says how many it sent.
 *
 *   generator INTERFACE DESTINATION-MAC PORT SIZE RATE COUNT SECONDS FIRST
 *
 * SIZE is bytes on the wire without the frame check sequence; RATE packets per second, 0 for as fast as it goes; it ends
 * after COUNT packets (0: no limit) or SECONDS (0: no limit), or on SIGTERM or SIGINT. FIRST is the first packet's number.
 * Each packet carries "KPCB" and its number, 64 bits little endian, as its payload; the checker counts these.
 * A packet that the link refuses is sent again, so each number goes over the wire exactly once. At the end there is a
 * line of JSON on standard output.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_packet.h>
#include <net/if.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 16, ETHERNET = 14, IPV4 = 20, UDP = 8, PAYLOAD = 12, LARGEST = 65535 };

static volatile sig_atomic_t ending;

static void end(int number) {
    (void)number;
    ending = 1;
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void put16(uint8_t *at, unsigned value) {
    at[0] = value >> 8;
    at[1] = value;
}

static unsigned checksum(const uint8_t *bytes, int length) {
    unsigned sum = 0;
    for (int i = 0; i < length; i += 2) sum += bytes[i] << 8 | bytes[i + 1];
    while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
    return ~sum & 0xffff;
}

/* A frame from 192.0.2.1 to 198.51.100.1, where nobody is: the pod's kernel takes it in and answers nothing. */
static void compose(uint8_t *frame, int size, const uint8_t *source, const unsigned *destination, int port) {
    memset(frame, 0x5a, size);
    for (int i = 0; i < 6; i++) frame[i] = destination[i];
    memcpy(frame + 6, source, 6);
    put16(frame + 12, 0x0800);
    uint8_t *ip = frame + ETHERNET;
    memset(ip, 0, IPV4 + UDP);
    ip[0] = 0x45;
    put16(ip + 2, size - ETHERNET);
    ip[6] = 0x40; /* don't fragment */
    ip[8] = 64;
    ip[9] = 17;
    inet_pton(AF_INET, "192.0.2.1", ip + 12);
    inet_pton(AF_INET, "198.51.100.1", ip + 16);
    put16(ip + 10, checksum(ip, IPV4));
    put16(ip + IPV4, 4660);
    put16(ip + IPV4 + 2, port);
    put16(ip + IPV4 + 4, size - ETHERNET - IPV4);
    memcpy(ip + IPV4 + UDP, "KPCB", 4);
}

/* Sleeps while there is time for it, then turns: a sleep is late by some tens of microseconds. */
static void wait_until(uint64_t due) {
    for (uint64_t time; (time = now()) < due && !ending;) {
        if (due - time > 150000) {
            uint64_t rest = due - time - 80000;
            struct timespec pause = {rest / 1000000000, rest % 1000000000};
            nanosleep(&pause, NULL);
        }
    }
}

int main(int count, char **arguments) {
    unsigned destination[6];
    if (count != 9 || sscanf(arguments[2], "%x:%x:%x:%x:%x:%x", destination, destination + 1, destination + 2,
                             destination + 3, destination + 4, destination + 5) != 6) {
        fprintf(stderr, "usage: generator INTERFACE DESTINATION-MAC PORT SIZE RATE COUNT SECONDS FIRST\n");
        return 2;
    }
    const char *interface = arguments[1];
    int port = atoi(arguments[3]), size = atoi(arguments[4]);
    double rate = atof(arguments[5]), seconds = atof(arguments[7]);
    uint64_t packets = strtoull(arguments[6], NULL, 10), first = strtoull(arguments[8], NULL, 10);
    if (size < ETHERNET + IPV4 + UDP + PAYLOAD || size > LARGEST) {
        fprintf(stderr, "SIZE must be from %d to %d\n", ETHERNET + IPV4 + UDP + PAYLOAD, LARGEST);
        return 2;
    }
    signal(SIGTERM, end);
    signal(SIGINT, end);

    int link = socket(AF_PACKET, SOCK_RAW, 0); /* protocol 0: it receives nothing itself */
    if (link < 0) fail("socket");
    struct sockaddr_ll address = {.sll_family = AF_PACKET, .sll_ifindex = if_nametoindex(interface)};
    if (bind(link, (struct sockaddr *)&address, sizeof address)) fail(interface);
    int room = 64 << 20;
    setsockopt(link, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room);
    struct ifreq request = {0};
    strncpy(request.ifr_name, interface, IFNAMSIZ - 1);
    if (ioctl(link, SIOCGIFHWADDR, &request)) fail(interface);

    static uint8_t frames[BATCH][LARGEST];
    struct iovec vectors[BATCH];
    struct mmsghdr messages[BATCH] = {0};
    for (int i = 0; i < BATCH; i++) {
        compose(frames[i], size, (uint8_t *)request.ifr_hwaddr.sa_data, destination, port);
        vectors[i] = (struct iovec){frames[i], size};
        messages[i].msg_hdr.msg_iov = vectors + i;
        messages[i].msg_hdr.msg_iovlen = 1;
    }

    uint64_t sent = 0, refused = 0, began = now();
    while (!ending && (!packets || sent < packets)) {
        if (rate > 0) wait_until(began + sent / rate * 1e9);
        if (ending || (seconds > 0 && now() - began >= seconds * 1e9)) break;
        int batch = packets && packets - sent < BATCH ? (int)(packets - sent) : BATCH;
        for (int i = 0; i < batch; i++) {
            uint64_t number = first + sent + i;
            memcpy(frames[i] + ETHERNET + IPV4 + UDP + 4, &number, sizeof number);
        }
        for (int done = 0; done < batch;) {
            int taken = sendmmsg(link, messages + done, batch - done, 0);
            if (taken < 0 && errno != ENOBUFS && errno != EAGAIN && errno != EINTR) fail("sendmmsg");
            if (taken < 0)
                refused += errno != EINTR;
            else
                done += taken;
        }
        sent += batch;
    }
    printf("{\"sent\": %llu, \"refused\": %llu, \"seconds\": %.6f}\n", (unsigned long long)sent,
           (unsigned long long)refused, (now() - began) / 1e9);
    return 0;
}
