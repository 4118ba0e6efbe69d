/* The warm start: from loose blocks, each with the key before it, to runs. The oracle is build_runs in flexkv_core/cache/chains.py. */
#include "run_store.h"

#include <stdlib.h>
#include <string.h>

enum { ROOT = -1, LOST = -2, FOUND = -3 };

#define AHEAD 16 /* table places that are fetched before they are needed: each is a miss in the caches */

typedef struct {
    const fk_blocks *blocks;
    uint64_t *table; /* open addressing: high 32 bits a hash of the key, low 32 bits place + 1; 0 = empty */
    size_t mask;
    int32_t *parent;   /* place of the block before; ROOT; LOST: there is none, or the key came before; FOUND: is in a run */
    int32_t *first;    /* children of the root are children[first[0]] .. first[1] - 1, of block i children[first[i + 1]] .. first[i + 2] - 1 */
    int32_t *children; /* places, grouped by parent, ascending */
} loading;

static const uint8_t zero_key[FK_KEY_BYTES];

static const uint8_t *key_at(const uint8_t *keys, int64_t i) {
    return keys + FK_KEY_BYTES * (size_t)i;
}

static size_t place_of(const loading *l, const uint8_t *key) {
    uint32_t hash = fk_hash_of(key);
    size_t at = hash & l->mask;
    for (uint64_t entry; (entry = l->table[at]) != 0; at = (at + 1) & l->mask)
        if (entry >> 32 == hash && fk_same_key(key_at(l->blocks->keys, (int64_t)(uint32_t)entry - 1), key))
            break;
    return at;
}

static void fetch(const loading *l, const uint8_t *keys, int32_t i) {
    if (i < l->blocks->count)
        __builtin_prefetch(&l->table[fk_hash_of(key_at(keys, i)) & l->mask]);
}

static void enter_keys(loading *l) {
    const uint8_t *keys = l->blocks->keys;
    for (int32_t i = 0; i < l->blocks->count; i++) {
        fetch(l, keys, i + AHEAD);
        const uint8_t *key = key_at(keys, i);
        size_t at = place_of(l, key);
        int known = l->table[at] != 0 || fk_same_key(key, zero_key);
        l->parent[i] = known ? LOST : ROOT;
        if (!known)
            l->table[at] = (uint64_t)fk_hash_of(key) << 32 | ((uint32_t)i + 1);
    }
}

static void find_parents(loading *l) {
    const fk_blocks *blocks = l->blocks;
    for (int32_t i = 0; i < blocks->count; i++) {
        fetch(l, blocks->parents, i + AHEAD);
        const uint8_t *parent = key_at(blocks->parents, i);
        if (l->parent[i] == LOST || fk_same_key(parent, zero_key))
            continue;
        /* Blocks that were written together lie side by side. */
        if (i > 0 && l->parent[i - 1] != LOST && fk_same_key(parent, key_at(blocks->keys, i - 1))) {
            l->parent[i] = i - 1;
            continue;
        }
        uint64_t entry = l->table[place_of(l, parent)];
        l->parent[i] = entry ? (int32_t)((uint32_t)entry - 1) : LOST;
    }
}

static void group_children(loading *l) {
    int32_t count = l->blocks->count, *first = l->first;
    for (int32_t i = 0; i < count; i++)
        if (l->parent[i] != LOST)
            first[l->parent[i] + 3]++;
    for (int32_t i = 0; i <= count; i++)
        first[i + 2] += first[i + 1];
    /* first[p + 2] is where the children of p begin now, and where they end when all are in place. */
    for (int32_t i = 0; i < count; i++)
        if (l->parent[i] != LOST)
            l->children[first[l->parent[i] + 2]++] = i;
}

static int32_t child_count(const loading *l, int32_t block) {
    return l->first[block + 2] - l->first[block + 1];
}

/* What make_run copies of a block: where the blocks of a sequence lie scattered, that is most of the time. */
static void fetch_block(const loading *l, int32_t block) {
    __builtin_prefetch(key_at(l->blocks->keys, block));
    __builtin_prefetch(&l->blocks->slots[block]);
    __builtin_prefetch(&l->blocks->ages[block]);
    __builtin_prefetch(&l->parent[block], 1);
}

/* One run from `block` on, as long as there is exactly one child. Returns its id, or -1; *last is its last block. */
static int32_t make_run(fk_tree *tree, loading *l, int tier, int32_t block, int32_t *last, int64_t *newest) {
    int32_t length = 1;
    for (*last = block; child_count(l, *last) == 1; length++) {
        *last = l->children[l->first[*last + 1]];
        fetch_block(l, *last);
    }
    uint8_t *keys = malloc((size_t)length * FK_KEY_BYTES);
    int32_t *slots[FK_TIERS] = {NULL};
    slots[tier] = malloc((size_t)length * sizeof **slots);
    *newest = INT64_MIN;
    for (int32_t i = 0; keys && slots[tier] && i < length; i++) {
        memcpy(keys + (size_t)FK_KEY_BYTES * (size_t)i, key_at(l->blocks->keys, block), FK_KEY_BYTES);
        slots[tier][i] = l->blocks->slots[block];
        if (l->blocks->ages[block] > *newest)
            *newest = l->blocks->ages[block];
        l->parent[block] = FOUND;
        block = l->children[l->first[block + 1]]; /* of the last one: not used, and inside of the array */
    }
    int32_t id = keys && slots[tier] ? fk_new_run(tree, keys, length, slots) : -1;
    if (id < 0)
        fk_free_arrays(keys, slots);
    else
        tree->blocks += length;
    return id;
}

typedef struct {
    int32_t above, block; /* place of the parent among the runs, or -1; first block */
} waiting;

static int push_children(const loading *l, fk_vector *stack, int32_t above, int32_t bucket) {
    for (int32_t i = l->first[bucket + 1] - 1; i >= l->first[bucket]; i--) {
        waiting next = {above, l->children[i]};
        if (fk_vector_reserve(stack, sizeof next) != FK_DONE)
            return FK_NO_MEMORY;
        fk_vector_append(stack, &next, sizeof next);
    }
    return FK_DONE;
}

/* Parents before children; `above` gets the place of each one's parent. */
static int make_runs(fk_tree *tree, loading *l, int tier, fk_vector *stack, fk_vector *above, fk_vector *ids, fk_vector *newest) {
    int status = push_children(l, stack, -1, 0);
    while (status == FK_DONE && stack->used) {
        stack->used -= sizeof(waiting);
        waiting next = *(waiting *)((char *)stack->data + stack->used);
        if (fk_vector_reserve(above, sizeof(int32_t)) != FK_DONE || fk_vector_reserve(ids, sizeof(int32_t)) != FK_DONE ||
            fk_vector_reserve(newest, sizeof(int64_t)) != FK_DONE)
            return FK_NO_MEMORY;
        int32_t last, place = (int32_t)(ids->used / sizeof(int32_t));
        int64_t age;
        int32_t id = make_run(tree, l, tier, next.block, &last, &age);
        if (id < 0)
            return FK_NO_MEMORY;
        fk_link_child(tree, next.above < 0 ? -1 : ((int32_t *)ids->data)[next.above], id);
        fk_table_set(tree, id);
        fk_vector_append(above, &next.above, sizeof next.above);
        fk_vector_append(ids, &id, sizeof id);
        fk_vector_append(newest, &age, sizeof age);
        status = push_children(l, stack, place, last + 1);
    }
    return status;
}

static void spread_ages(const fk_vector *above, fk_vector *newest) {
    const int32_t *parents = above->data;
    int64_t *ages = newest->data;
    for (int64_t i = (int64_t)(above->used / sizeof *parents) - 1; i >= 0; i--)
        if (parents[i] >= 0 && ages[parents[i]] < ages[i])
            ages[parents[i]] = ages[i];
}

static int list_dropped(const loading *l, fk_vector *dropped) {
    for (int32_t i = 0; i < l->blocks->count; i++)
        if (l->parent[i] != FOUND) {
            if (fk_vector_reserve(dropped, sizeof i) != FK_DONE)
                return FK_NO_MEMORY;
            fk_vector_append(dropped, &i, sizeof i);
        }
    return FK_DONE;
}

static void unmake_runs(fk_tree *tree, const fk_vector *ids) {
    const int32_t *made = ids->data;
    for (int64_t i = (int64_t)(ids->used / sizeof *made) - 1; i >= 0; i--) {
        fk_run *run = fk_tree_run(tree, made[i]);
        tree->blocks -= run->length;
        fk_table_remove(tree, run->head);
        fk_unlink_child(tree, made[i]);
        fk_forget_run(tree, made[i]);
    }
}

int fk_tree_load(fk_tree *tree, int tier, const fk_blocks *blocks, fk_vector *dropped, fk_vector *ids, fk_vector *newest) {
    size_t count = (size_t)blocks->count, size = 1024;
    while (size < 2 * count)
        size *= 2;
    loading l = {.blocks = blocks, .mask = size - 1};
    l.table = calloc(size, sizeof *l.table);
    l.parent = malloc((count + 1) * sizeof *l.parent);
    l.first = calloc(count + 3, sizeof *l.first);
    l.children = calloc(count + 1, sizeof *l.children); /* one more: see make_run */
    fk_vector stack = {0}, above = {0};
    int status = FK_NO_MEMORY;
    if (l.table && l.parent && l.first && l.children) {
        enter_keys(&l);
        find_parents(&l);
        group_children(&l);
        tree->tiers |= 1u << tier;
        status = make_runs(tree, &l, tier, &stack, &above, ids, newest);
        if (status == FK_DONE)
            status = list_dropped(&l, dropped);
        if (status == FK_DONE)
            spread_ages(&above, newest);
        else
            unmake_runs(tree, ids);
    }
    free(l.table);
    free(l.parent);
    free(l.first);
    free(l.children);
    free(stack.data);
    free(above.data);
    return status;
}
