/* The radix tree of path-compressed runs; no Python in here. What a run is, and what each operation means, stands in
 * flexkv_core/cache/radix_tree.py, whose PyRunIndex is the oracle of this code. Not thread-safe; the caller holds a lock. */
#ifndef FLEXKV_RUN_TREE_H
#define FLEXKV_RUN_TREE_H

#include <stddef.h>
#include <stdint.h>

#define FK_KEY_BYTES 16
#define FK_TIERS 3
#define FK_NOT_THERE (-1)
#define FK_ON_ITS_WAY (-2) /* in place of a slot; see ON_ITS_WAY in flexkv_core/cache/run.py */

/* A match reads the first 64 bytes of each run that it passes, and the slots. Head and tail are copies of the first and the last key:
 * without them each comparison would wait for one more line of memory. */
typedef struct {
    uint8_t head[FK_KEY_BYTES];
    uint8_t tail[FK_KEY_BYTES];
    int32_t length;      /* blocks */
    int32_t parent;      /* -1: the root */
    int32_t first_child; /* -1: none; of an unused entry: the next unused one */
    uint8_t used, writing, detached;
    int32_t *slots[FK_TIERS]; /* `capacity` entries; NULL: the tier holds none of them */
    uint8_t *keys;            /* `capacity` keys */
    int32_t capacity;         /* >= length: a trimmed tail is cut off when half of the room is unused */
    int32_t next, prev;       /* siblings */
    int32_t children;
    int32_t pins;
    int32_t children_in[FK_TIERS]; /* children that hold slots in the tier, themselves or below them */
    int32_t busy_children;         /* children that are pinned, themselves or below them */
} fk_run;

typedef struct {
    void *data;
    size_t used, capacity; /* bytes */
} fk_vector;

typedef struct {
    fk_run **chunks; /* runs by id, in chunks that never move: growing copies nothing and over-allocates one chunk at most */
    int32_t chunk_count;
    int32_t unused; /* first entry of the list of unused ids, -1: none */
    int32_t first_root;
    uint64_t *table; /* open addressing, linear probing: high 32 bits a hash of the head, low 32 bits id + 1; 0 = empty */
    size_t table_size; /* a power of two */
    size_t run_count;  /* attached runs = entries of the table */
    int64_t blocks;    /* in attached runs */
    int track_removed;
    unsigned tiers; /* bits of those that were ever used */
    fk_vector freed[FK_TIERS]; /* int32 slots that were let go */
    fk_vector removed[FK_TIERS]; /* keys of published blocks that a tier lost, by an eviction or because they left the tree */
} fk_tree;

typedef struct {
    int64_t blocks;
    int32_t run, at;
} fk_match;

typedef struct {
    int64_t freed;
    int64_t done;  /* leading runs that have no slot in the tier any more */
    int blocked;   /* the run after them is not evictable */
    int32_t above; /* what may have become evictable, or -1 */
} fk_eviction;

typedef struct {
    const int32_t *slots;
    const uint8_t *keys, *parents;
    const int64_t *ages;
    int32_t count;
} fk_blocks;

/* All that return int: 0 = done, FK_NO_MEMORY = nothing was changed. Ids must be of used runs (fk_tree_has). */
enum { FK_DONE = 0, FK_NO_MEMORY = -2, FK_TOO_FEW = -3 };

int fk_tree_init(fk_tree *tree, int track_removed);
void fk_tree_destroy(fk_tree *tree);

static inline fk_run *fk_tree_run(const fk_tree *tree, int32_t id);
int fk_tree_has(const fk_tree *tree, int64_t id);
int32_t fk_tree_find(const fk_tree *tree, const uint8_t *head);

/* out: NULL, or room for the slots in `tier` of blocks start .. total - 1. */
fk_match fk_tree_match(const fk_tree *tree, const uint8_t *keys, int64_t total, int64_t start, int32_t *out, int tier,
                       int through_writing);
int fk_tree_insert(fk_tree *tree, int32_t parent, const uint8_t *keys, int32_t length, int tier, const int32_t *slots, int32_t *id);
int fk_tree_split(fk_tree *tree, int32_t id, int32_t at, int32_t *head_id);
int fk_tree_merge(fk_tree *tree, int32_t id, int64_t blocks_max, int32_t *absorbed); /* *absorbed = -1: not possible */
int fk_tree_set_slots(fk_tree *tree, int32_t id, int tier, int32_t at, const int32_t *slots, int32_t count);
/* Settles `count` blocks that end `skip` blocks before the end of the run, upwards; slots that the tree took become -1. Appends the runs that
 * gained the tier to `gained` (int32). FK_NO_MEMORY: some may be settled and others not. FK_TOO_FEW: there are not so many blocks. */
int fk_tree_fill(fk_tree *tree, int32_t id, int64_t skip, int tier, int32_t *slots, int64_t count, fk_vector *gained);
/* The tree must be empty. Appends positions that were dropped (int32), ids of the runs (int32) and the newest age of each (int64). */
int fk_tree_load(fk_tree *tree, int tier, const fk_blocks *blocks, fk_vector *dropped, fk_vector *ids, fk_vector *newest);
void fk_tree_pin(fk_tree *tree, int32_t id);
int fk_tree_release(fk_tree *tree, int32_t id, int32_t *above); /* *above: the run, or the nearest above it that is left, or -1 */
/* One run after the other, until one is not evictable or gone, or something above one may be evictable now. Ids need not be of used runs.
 * Appends the ids that left the tree to `gone` (int32), as the next one does. */
int fk_tree_evict(fk_tree *tree, const int32_t *ids, int64_t count, int tier, int64_t want, fk_eviction *result, fk_vector *gone);
int fk_tree_detach(fk_tree *tree, int32_t id, fk_vector *gone);
int fk_tree_evictable(const fk_tree *tree, int32_t id, int tier);
int32_t fk_tree_leaf(const fk_tree *tree, int32_t id, int tier);
/* The first stretch of blocks from *at on that are in tier `have` and not in `lack`, at most `limit`; returns its length, 0: none. */
int64_t fk_tree_missing(const fk_tree *tree, int32_t id, int have, int lack, int64_t *at, int64_t limit);
/* Appends (run, place in it, slot) as three int32 for each of `slots` that an attached run holds in the tier; by run, then by place. */
int fk_tree_locate(const fk_tree *tree, int tier, const int32_t *slots, int64_t count, fk_vector *found);
size_t fk_tree_memory(const fk_tree *tree);

int fk_vector_reserve(fk_vector *vector, size_t more);

#define FK_CHUNK_RUNS 1024

static inline fk_run *fk_tree_run(const fk_tree *tree, int32_t id) {
    return &tree->chunks[id / FK_CHUNK_RUNS][id % FK_CHUNK_RUNS];
}

#endif
