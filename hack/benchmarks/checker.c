/* Reads pcap files and counts the generator's packets in them, by their numbers.
 *
 *   checker FILE…
 *
 * The files are taken to be in the order of time. A line of JSON on standard output says: packets of any kind, numbered
 * ones, how many of these came twice or after a higher number, the bytes after the last whole record of a file, how many
 * files have no whole header, and which numbers are missing between the lowest and the highest, as ranges.
 * What is malformed beyond a torn end (a length that can't be) makes it fail.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILE_HEADER = 24, RECORD_HEADER = 16, PAYLOAD = 14 + 20 + 8, LARGEST = 262144, RANGES = 1000 };
#define NUMBERS (1ull << 32)

static uint8_t *seen; /* a bit for each number; pages that are never touched cost nothing */
static uint64_t packets, numbered, twice, disordered, torn, headless, lowest = UINT64_MAX, highest;

static void take(uint64_t number) {
    if (number >= NUMBERS) {
        fprintf(stderr, "number %llu is too high\n", (unsigned long long)number);
        exit(1);
    }
    numbered++;
    if (seen[number >> 3] & 1 << (number & 7)) twice++;
    seen[number >> 3] |= 1 << (number & 7);
    if (number < lowest) lowest = number;
    if (number >= highest)
        highest = number;
    else
        disordered++;
}

static void read_file(const char *path) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    if (file < 0 || fstat(file, &status)) {
        perror(path);
        exit(1);
    }
    uint64_t size = status.st_size, at = FILE_HEADER;
    if (size < FILE_HEADER) {
        headless++;
        torn += size;
        close(file);
        return;
    }
    uint8_t *bytes = mmap(NULL, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (bytes == MAP_FAILED) {
        perror(path);
        exit(1);
    }
    madvise(bytes, size, MADV_SEQUENTIAL);
    uint32_t magic;
    memcpy(&magic, bytes, sizeof magic);
    if (magic != 0xa1b2c3d4 && magic != 0xa1b23c4d) {
        fprintf(stderr, "%s is not a pcap file of this machine\n", path);
        exit(1);
    }
    while (size - at >= RECORD_HEADER) {
        uint32_t length;
        memcpy(&length, bytes + at + 8, sizeof length);
        if (length > LARGEST) {
            fprintf(stderr, "%s: the record at %llu claims %u bytes\n", path, (unsigned long long)at, length);
            exit(1);
        }
        if (size - at - RECORD_HEADER < length) break;
        const uint8_t *packet = bytes + at + RECORD_HEADER;
        packets++;
        if (length >= PAYLOAD + 12 && !memcmp(packet + PAYLOAD, "KPCB", 4)) {
            uint64_t number;
            memcpy(&number, packet + PAYLOAD + 4, sizeof number);
            take(number);
        }
        at += RECORD_HEADER + length;
    }
    torn += size - at;
    munmap(bytes, size);
    close(file);
}

int main(int count, char **arguments) {
    seen = mmap(NULL, NUMBERS / 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (seen == MAP_FAILED) {
        perror("memory");
        return 1;
    }
    for (int i = 1; i < count; i++) read_file(arguments[i]);
    printf("{\"packets\": %llu, \"numbered\": %llu, \"twice\": %llu, \"disordered\": %llu, \"torn\": %llu, \"headless\": %llu, ",
           (unsigned long long)packets, (unsigned long long)numbered, (unsigned long long)twice,
           (unsigned long long)disordered, (unsigned long long)torn, (unsigned long long)headless);
    if (numbered)
        printf("\"lowest\": %llu, \"highest\": %llu, ", (unsigned long long)lowest, (unsigned long long)highest);
    else
        printf("\"lowest\": null, \"highest\": null, ");
    printf("\"missing\": [");
    int ranges = 0;
    for (uint64_t number = lowest; numbered && number <= highest && ranges < RANGES; number++) {
        if (seen[number >> 3] & 1 << (number & 7)) continue;
        uint64_t from = number;
        while (!(seen[number >> 3] & 1 << (number & 7))) number++;
        printf("%s[%llu, %llu]", ranges++ ? ", " : "", (unsigned long long)from, (unsigned long long)(number - 1));
    }
    printf("]}\n");
    return 0;
}
