/* One side of a shared ring, driven by ring.h's own macros, with a peer in another process.
 *
 *   peer front|back blk|tx|rx FILE PAGES START COUNT
 *
 * FILE is the shared ring. A byte on standard input is the peer's notification, a byte on standard
 * output is this side's. Sleeps (reads standard input) whenever the final check allows it, so that a
 * single lost notification stops the exchange. Every field of every request and response is a function
 * of its number (`mix`), which the peer computes too; the program exits with status 1 at the first wrong
 * one. Prints "ok items=COUNT waits=N notifies=N" on standard error at the end. */
#include "xen_headers.h"
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

static unsigned long waits, notifies;

static void fail(const char *what, uint64_t item)
{
    fprintf(stderr, "peer: %s (item %llu)\n", what, (unsigned long long)item);
    exit(1);
}

#define CHECK(item, condition)                                                                     \
    do {                                                                                           \
        if (!(condition))                                                                          \
            fail(#condition, item);                                                                \
    } while (0)

static void wait_event(void)
{
    char bytes[64];
    ssize_t got;
    waits++;
    do
        got = read(0, bytes, sizeof bytes);
    while (got < 0 && errno == EINTR);
    if (got <= 0)
        fail("the peer is gone", waits);
}

static void notify(void)
{
    notifies++;
    if (write(1, "!", 1) != 1)
        fail("cannot notify", notifies);
}

static uint64_t mix(uint64_t item, uint64_t field)
{
    uint64_t x = item * 0x9e3779b97f4a7c15u + field * 0xbf58476d1ce4e5b9u;
    x ^= x >> 31;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 29);
}

/* --- items of each kind: fill in, or check --- */

static void blk_request_of(uint64_t n, struct blkif_request *req)
{
    static const uint8_t ops[] = { BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER,
                                   BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD,
                                   BLKIF_OP_INDIRECT };
    memset(req, 0, sizeof *req);
    req->operation = ops[mix(n, 0) % 6];
    req->handle = (uint16_t)mix(n, 4);
    req->id = (mix(n, 1) << 32) | (uint32_t)n;
    req->sector_number = mix(n, 2);
    if (req->operation == BLKIF_OP_DISCARD) {
        struct blkif_request_discard *discard = (void *)req;
        discard->flag = mix(n, 3) & BLKIF_DISCARD_SECURE;
        discard->nr_sectors = mix(n, 5);
        return;
    }
    if (req->operation == BLKIF_OP_INDIRECT) {
        struct blkif_request_indirect *indirect = (void *)req;
        indirect->indirect_op = mix(n, 3) & 1;
        indirect->nr_segments = 1 + mix(n, 5) % (512 * BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST);
        indirect->id = (mix(n, 1) << 32) | (uint32_t)n;
        indirect->sector_number = mix(n, 2);
        indirect->handle = (uint16_t)mix(n, 4);
        for (unsigned i = 0; i < (indirect->nr_segments + 511u) / 512; i++)
            indirect->indirect_grefs[i] = (uint32_t)mix(n, 16 + i);
        return;
    }
    req->nr_segments = 1 + mix(n, 3) % BLKIF_MAX_SEGMENTS_PER_REQUEST;
    for (unsigned i = 0; i < req->nr_segments; i++) {
        uint8_t a = mix(n, 32 + i) & 7, b = (mix(n, 32 + i) >> 3) & 7;
        req->seg[i].gref = (uint32_t)mix(n, 16 + i);
        req->seg[i].first_sect = a < b ? a : b;
        req->seg[i].last_sect = a < b ? b : a;
    }
}

static void blk_check_request(uint64_t n, struct blkif_request *got)
{
    struct blkif_request want;
    blk_request_of(n, &want);
    CHECK(n, got->operation == want.operation);
    if (got->operation == BLKIF_OP_INDIRECT) {
        CHECK(n, memcmp(got, &want, sizeof(struct blkif_request_indirect)) == 0);
        return;
    }
    CHECK(n, got->nr_segments == want.nr_segments);
    CHECK(n, got->handle == want.handle);
    CHECK(n, got->id == want.id);
    CHECK(n, got->sector_number == want.sector_number);
    if (got->operation == BLKIF_OP_DISCARD) {
        CHECK(n, ((struct blkif_request_discard *)got)->nr_sectors ==
                     ((struct blkif_request_discard *)&want)->nr_sectors);
        return;
    }
    for (unsigned i = 0; i < want.nr_segments; i++) {
        CHECK(n, got->seg[i].gref == want.seg[i].gref);
        CHECK(n, got->seg[i].first_sect == want.seg[i].first_sect);
        CHECK(n, got->seg[i].last_sect == want.seg[i].last_sect);
    }
}

static void blk_response_of(uint64_t n, struct blkif_response *rsp)
{
    struct blkif_request req;
    blk_request_of(n, &req);
    memset(rsp, 0, sizeof *rsp);
    rsp->id = req.id;
    /* The response to an indirect request has the inner operation code, as in Linux's backend. */
    rsp->operation = req.operation == BLKIF_OP_INDIRECT
                         ? ((struct blkif_request_indirect *)&req)->indirect_op : req.operation;
    rsp->status = -(int16_t)(mix(n, 6) % 3);
}

/* Checks a response and returns the number of its request; `oldest` is not used here. */
static uint64_t blk_check_response(uint64_t oldest, struct blkif_response *got)
{
    uint64_t n = (uint32_t)got->id;
    struct blkif_response want;
    (void)oldest;
    blk_response_of(n, &want);
    CHECK(n, got->id == want.id);
    CHECK(n, got->operation == want.operation);
    CHECK(n, got->status == want.status);
    return n;
}

static void tx_request_of(uint64_t n, struct netif_tx_request *req)
{
    req->gref = (uint32_t)mix(n, 0);
    req->offset = (uint16_t)mix(n, 1);
    req->flags = mix(n, 2) & 15;
    req->id = (uint16_t)n;
    req->size = (uint16_t)mix(n, 3);
}

static void tx_check_request(uint64_t n, struct netif_tx_request *got)
{
    struct netif_tx_request want;
    tx_request_of(n, &want);
    CHECK(n, got->gref == want.gref);
    CHECK(n, got->offset == want.offset);
    CHECK(n, got->flags == want.flags);
    CHECK(n, got->id == want.id);
    CHECK(n, got->size == want.size);
}

static void tx_response_of(uint64_t n, struct netif_tx_response *rsp)
{
    rsp->id = (uint16_t)n;
    rsp->status = (int16_t)(mix(n, 4) % 4) - 2;
}

static uint64_t tx_check_response(uint64_t oldest, struct netif_tx_response *got)
{
    uint64_t n = oldest + (uint16_t)(got->id - (uint16_t)oldest);
    struct netif_tx_response want;
    tx_response_of(n, &want);
    CHECK(n, got->status == want.status);
    return n;
}

static void rx_request_of(uint64_t n, struct netif_rx_request *req)
{
    memset(req, 0, sizeof *req);
    req->id = (uint16_t)n;
    req->gref = (uint32_t)mix(n, 0);
}

static void rx_check_request(uint64_t n, struct netif_rx_request *got)
{
    CHECK(n, got->id == (uint16_t)n);
    CHECK(n, got->gref == (uint32_t)mix(n, 0));
}

static void rx_response_of(uint64_t n, struct netif_rx_response *rsp)
{
    rsp->id = (uint16_t)n;
    rsp->offset = (uint16_t)mix(n, 1);
    rsp->flags = mix(n, 2) & 31;
    rsp->status = (int16_t)mix(n, 3);
}

static uint64_t rx_check_response(uint64_t oldest, struct netif_rx_response *got)
{
    struct netif_rx_response want;
    rx_response_of(oldest, &want);
    CHECK(oldest, got->id == want.id);
    CHECK(oldest, got->offset == want.offset);
    CHECK(oldest, got->flags == want.flags);
    CHECK(oldest, got->status == want.status);
    return oldest;
}

/* --- both sides, the same for every kind of ring --- */

#define MAX_SLOTS 1024
static uint8_t answered[MAX_SLOTS]; /* by request number modulo MAX_SLOTS: 1 if it has a response */

#define DEFINE_ENDS(kind, ring_name, in_order)                                                     \
    static void kind##_front(void *mem, size_t bytes, RING_IDX start, uint64_t count)              \
    {                                                                                              \
        ring_name##_sring_t *shared = mem;                                                         \
        ring_name##_front_ring_t ring;                                                             \
        uint64_t sent = 0, done = 0, oldest = 0;                                                   \
        if (start == 0) {                                                                          \
            XEN_FRONT_RING_INIT(&ring, shared, bytes);                                             \
        } else {                                                                                   \
            SHARED_RING_INIT(shared);                                                              \
            shared->req_prod = shared->rsp_prod = start;                                           \
            shared->req_event = shared->rsp_event = start + 1;                                     \
            FRONT_RING_ATTACH(&ring, shared, start, bytes);                                        \
        }                                                                                          \
        xen_wmb();                                                                                 \
        notify(); /* the ring can be attached to */                                                \
        while (done < count) {                                                                     \
            uint64_t burst = 1 + mix(sent, 7) % (mix(sent, 8) % 4 ? 4 : RING_SIZE(&ring));         \
            int must_notify, more;                                                                 \
            for (; burst && sent < count && !RING_FULL(&ring); burst--) {                          \
                kind##_request_of(sent, RING_GET_REQUEST(&ring, ring.req_prod_pvt));               \
                answered[sent % MAX_SLOTS] = 0;                                                    \
                ring.req_prod_pvt++;                                                               \
                sent++;                                                                            \
            }                                                                                      \
            RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, must_notify);                               \
            if (must_notify)                                                                       \
                notify();                                                                          \
            do {                                                                                   \
                RING_IDX prod = shared->rsp_prod;                                                  \
                xen_rmb();                                                                         \
                CHECK(done, !RING_RESPONSE_PROD_OVERFLOW(&ring, prod));                            \
                for (; ring.rsp_cons != prod; ring.rsp_cons++, done++) {                           \
                    __typeof__(shared->ring[0].rsp) rsp;                                           \
                    RING_COPY_RESPONSE(&ring, ring.rsp_cons, &rsp);                                \
                    uint64_t n = kind##_check_response(oldest, &rsp);                              \
                    CHECK(n, n >= oldest && n < sent && !answered[n % MAX_SLOTS]);                 \
                    answered[n % MAX_SLOTS] = 1;                                                   \
                    while (oldest < sent && answered[oldest % MAX_SLOTS])                          \
                        oldest++;                                                                  \
                }                                                                                  \
                RING_FINAL_CHECK_FOR_RESPONSES(&ring, more);                                       \
            } while (more);                                                                        \
            if (sent != done && (RING_FULL(&ring) || sent == count || mix(sent, 9) % 4 == 0))      \
                wait_event();                                                                      \
        }                                                                                          \
    }                                                                                              \
                                                                                                   \
    static void kind##_back(void *mem, size_t bytes, RING_IDX start, uint64_t count)               \
    {                                                                                              \
        ring_name##_sring_t *shared = mem;                                                         \
        ring_name##_back_ring_t ring;                                                              \
        uint64_t taken = 0;                                                                        \
        CHECK(0, shared->rsp_prod == start);                                                       \
        if (start == 0)                                                                            \
            BACK_RING_INIT(&ring, shared, bytes);                                                  \
        else                                                                                       \
            BACK_RING_ATTACH(&ring, shared, start, bytes);                                         \
        while (taken < count) {                                                                    \
            uint64_t first = taken, most = 1 + mix(taken, 10) % RING_SIZE(&ring);                  \
            RING_IDX prod = shared->req_prod;                                                      \
            int must_notify, more;                                                                 \
            xen_rmb();                                                                             \
            CHECK(taken, !RING_REQUEST_PROD_OVERFLOW(&ring, prod));                                \
            for (; ring.req_cons != prod && taken - first < most; ring.req_cons++, taken++) {      \
                __typeof__(shared->ring[0].req) req;                                               \
                RING_COPY_REQUEST(&ring, ring.req_cons, &req);                                     \
                kind##_check_request(taken, &req);                                                 \
            }                                                                                      \
            for (uint64_t i = first; i < taken; i++, ring.rsp_prod_pvt++)                          \
                kind##_response_of(in_order ? i : taken - 1 - (i - first),                         \
                                   RING_GET_RESPONSE(&ring, ring.rsp_prod_pvt));                   \
            RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&ring, must_notify);                              \
            if (must_notify)                                                                       \
                notify();                                                                          \
            RING_FINAL_CHECK_FOR_REQUESTS(&ring, more);                                            \
            if (!more && taken < count)                                                            \
                wait_event();                                                                      \
        }                                                                                          \
    }

DEFINE_ENDS(blk, blkif, 0)
DEFINE_ENDS(tx, netif_tx, 0)
DEFINE_ENDS(rx, netif_rx, 1)

int main(int argc, char **argv)
{
    if (argc != 7)
        return 2;
    int front = !strcmp(argv[1], "front"), fd = open(argv[3], O_RDWR);
    size_t bytes = strtoul(argv[4], NULL, 10) * PAGE;
    RING_IDX start = (RING_IDX)strtoul(argv[5], NULL, 10);
    uint64_t count = strtoull(argv[6], NULL, 10);
    if (fd < 0)
        fail("cannot open the ring", 0);
    void *mem = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mem == MAP_FAILED)
        fail("cannot map the ring", 0);
    if (!strcmp(argv[2], "blk"))
        (front ? blk_front : blk_back)(mem, bytes, start, count);
    else if (!strcmp(argv[2], "tx"))
        (front ? tx_front : tx_back)(mem, bytes, start, count);
    else
        (front ? rx_front : rx_back)(mem, bytes, start, count);
    fprintf(stderr, "ok items=%llu waits=%lu notifies=%lu\n", (unsigned long long)count, waits,
            notifies);
    return 0;
}
