/* The reference of the ring suite: a frontend thread on core 0 and a backend thread on core 1,
 * driven by the macros of Xen's own ring.h, busy-waiting.
 *
 *   ring_ref blk|tx|raw PAGES DEPTH BATCH COUNT
 *
 * blk: a 1-segment read and its response. tx: a packet and its response. raw: 112 bytes one way,
 * answered by moving the response producer alone. At most DEPTH in flight, the producer indices
 * published every BATCH, COUNT (a multiple of BATCH) in all. Prints the nanoseconds it took. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define __XEN_INTERFACE_VERSION__ 0x00040d00
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#include <xen/io/blkif.h>
#include <xen/io/netif.h>

#if defined(__x86_64__) || defined(__i386__)
#define relax() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define relax() __asm__ volatile("isb" ::: "memory")
#else
#define relax() __asm__ volatile("" ::: "memory")
#endif
/* A load the compiler may not hoist out of a busy-wait. */
#define look(x) (*(volatile RING_IDX *)&(x))

struct raw_item { uint64_t words[14]; };
DEFINE_RING_TYPES(raw, struct raw_item, struct raw_item);

static size_t bytes;
static uint64_t depth, batch, count;
static void *memory;
static pthread_barrier_t ready;

static void pin(int core)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
}

static void check(uint64_t got)
{
    uint64_t want = count % 2 ? count * ((count - 1) / 2) : count / 2 * (count - 1);
    if (got != want) {
        fprintf(stderr, "ring_ref: items were lost or changed\n");
        exit(1);
    }
}

/* --- what each item costs its two ends --- */

static inline void blk_ask(struct blkif_request *req, uint64_t n)
{
    req->operation = BLKIF_OP_READ;
    req->nr_segments = 1;
    req->handle = 0xca00;
    req->id = n;
    req->sector_number = n * 8;
    req->seg[0].gref = 8 + (n & 255);
    req->seg[0].first_sect = 0;
    req->seg[0].last_sect = 7;
}

static inline void blk_answer(struct blkif_request *req, struct blkif_response *rsp)
{
    int16_t status = BLKIF_RSP_OKAY;
    if (req->operation > BLKIF_OP_FLUSH_DISKCACHE)
        status = BLKIF_RSP_EOPNOTSUPP;
    else if (req->nr_segments == 0 || req->nr_segments > BLKIF_MAX_SEGMENTS_PER_REQUEST)
        status = BLKIF_RSP_ERROR;
    else
        for (unsigned i = 0; i < req->nr_segments; i++)
            if (req->seg[i].last_sect < req->seg[i].first_sect || req->seg[i].last_sect > 7)
                status = BLKIF_RSP_ERROR;
    if (req->sector_number != req->id * 8 || req->nr_segments != 1)
        status = BLKIF_RSP_ERROR;
    __asm__ volatile("" : : "r"(req) : "memory"); /* somebody would go on with the segments */
    rsp->id = req->id;
    rsp->operation = req->operation;
    rsp->status = status;
}

static inline uint64_t blk_take(struct blkif_response *rsp)
{
    return rsp->status == BLKIF_RSP_OKAY ? rsp->id : UINT64_MAX / 3;
}

static inline void tx_ask(struct netif_tx_request *req, uint64_t n)
{
    req->gref = 8 + (n & 255);
    req->offset = 64;
    req->flags = NETTXF_data_validated;
    req->id = (uint16_t)n;
    req->size = 1500;
}

static inline void tx_answer(struct netif_tx_request *req, struct netif_tx_response *rsp)
{
    int good = req->offset + req->size <= 4096 && !(req->flags & NETTXF_more_data);
    rsp->id = req->id;
    rsp->status = good ? NETIF_RSP_OKAY : NETIF_RSP_ERROR;
}

static inline uint64_t tx_take(struct netif_tx_response *rsp)
{
    return rsp->status == NETIF_RSP_OKAY ? rsp->id : UINT64_MAX / 3;
}

static inline void raw_ask(struct raw_item *req, uint64_t n)
{
    for (int i = 0; i < 14; i++)
        req->words[i] = n + i;
}

/* --- the two ends --- */

#define DEFINE_FRONT(kind, name, take_response)                                                    \
    static uint64_t kind##_front(void)                                                             \
    {                                                                                              \
        name##_sring_t *shared = memory;                                                           \
        name##_front_ring_t ring;                                                                  \
        uint64_t sent = 0, done = 0, sum = 0;                                                      \
        int notify;                                                                                \
        FRONT_RING_INIT(&ring, shared, bytes);                                                     \
        while (done < count) {                                                                     \
            RING_IDX prod;                                                                         \
            if (sent < count && sent - done + batch <= depth) {                                    \
                for (uint64_t i = 0; i < batch; i++, ring.req_prod_pvt++, sent++)                  \
                    kind##_ask(RING_GET_REQUEST(&ring, ring.req_prod_pvt), sent);                  \
                RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&ring, notify);                                \
                (void)notify;                                                                      \
            }                                                                                      \
            prod = look(shared->rsp_prod);                                                         \
            xen_rmb();                                                                             \
            if (RING_RESPONSE_PROD_OVERFLOW(&ring, prod))                                          \
                exit(1);                                                                           \
            if (prod == ring.rsp_cons)                                                             \
                relax();                                                                           \
            for (; ring.rsp_cons != prod; ring.rsp_cons++, done++) {                               \
                take_response                                                                      \
            }                                                                                      \
        }                                                                                          \
        return sum;                                                                                \
    }

#define DEFINE_BACK(kind, name, answer_request)                                                    \
    static uint64_t kind##_back(void)                                                              \
    {                                                                                              \
        name##_sring_t *shared = memory;                                                           \
        name##_back_ring_t ring;                                                                   \
        uint64_t done = 0, sum = 0;                                                                \
        int notify;                                                                                \
        BACK_RING_INIT(&ring, shared, bytes);                                                      \
        while (done < count) {                                                                     \
            RING_IDX prod = look(shared->req_prod);                                                \
            uint64_t unpublished = 0;                                                              \
            xen_rmb();                                                                             \
            if (RING_REQUEST_PROD_OVERFLOW(&ring, prod))                                           \
                exit(1);                                                                           \
            if (prod == ring.req_cons)                                                             \
                relax();                                                                           \
            while (ring.req_cons != prod) {                                                        \
                __typeof__(shared->ring[0].req) req;                                               \
                RING_COPY_REQUEST(&ring, ring.req_cons, &req);                                     \
                ring.req_cons++;                                                                   \
                answer_request                                                                     \
                ring.rsp_prod_pvt++;                                                               \
                done++;                                                                            \
                if (++unpublished == batch) {                                                      \
                    RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&ring, notify);                           \
                    (void)notify;                                                                  \
                    unpublished = 0;                                                               \
                }                                                                                  \
            }                                                                                      \
            if (unpublished) {                                                                     \
                RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&ring, notify);                               \
                (void)notify;                                                                      \
            }                                                                                      \
        }                                                                                          \
        return sum;                                                                                \
    }

#define TAKE(kind)                                                                                 \
    __typeof__(shared->ring[0].rsp) rsp;                                                           \
    RING_COPY_RESPONSE(&ring, ring.rsp_cons, &rsp);                                                \
    sum += kind##_take(&rsp);
#define ANSWER(kind)                                                                               \
    kind##_answer(&req, RING_GET_RESPONSE(&ring, ring.rsp_prod_pvt));                              \
    sum += req.id;

DEFINE_FRONT(blk, blkif, TAKE(blk))
DEFINE_BACK(blk, blkif, ANSWER(blk))
DEFINE_FRONT(tx, netif_tx, TAKE(tx))
DEFINE_BACK(tx, netif_tx, ANSWER(tx))
DEFINE_FRONT(raw, raw, )
DEFINE_BACK(raw, raw, sum += req.words[0] + (req.words[13] - req.words[0] - 13);)

static uint64_t (*front)(void), (*back)(void);

static void *back_thread(void *unused)
{
    pin(1);
    pthread_barrier_wait(&ready);
    uint64_t sum = back();
    if (back != tx_back)
        check(sum);
    return unused;
}

int main(int argc, char **argv)
{
    struct timespec from, to;
    pthread_t thread;
    if (argc != 6)
        return 2;
    bytes = strtoul(argv[2], NULL, 10) * 4096;
    depth = strtoull(argv[3], NULL, 10);
    batch = strtoull(argv[4], NULL, 10);
    count = strtoull(argv[5], NULL, 10);
    front = !strcmp(argv[1], "blk") ? blk_front : !strcmp(argv[1], "tx") ? tx_front : raw_front;
    back = !strcmp(argv[1], "blk") ? blk_back : !strcmp(argv[1], "tx") ? tx_back : raw_back;
    memory = aligned_alloc(4096, bytes);
    memset(memory, 0, bytes);
    blkif_sring_t *header = memory; /* the header is the same in all three */
    SHARED_RING_INIT(header);
    pthread_barrier_init(&ready, NULL, 2);
    pin(0);
    if (pthread_create(&thread, NULL, back_thread, NULL))
        return 1;
    pthread_barrier_wait(&ready);
    clock_gettime(CLOCK_MONOTONIC, &from);
    uint64_t sum = front();
    clock_gettime(CLOCK_MONOTONIC, &to);
    if (front == blk_front)
        check(sum);
    pthread_join(thread, NULL);
    printf("%lld\n", (to.tv_sec - from.tv_sec) * 1000000000ll + to.tv_nsec - from.tv_nsec);
    return 0;
}
