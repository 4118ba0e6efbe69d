/* How runs and slots leave the tree: releases, evictions, and what is cut off. */
#include "run_store.h"

#include <stdlib.h>
#include <string.h>

/* Room in the vectors for all that this run can let go: whatever follows can't fail then. */
static int reserve_for(fk_tree *tree, int64_t blocks) {
    for (int tier = 0; tier < FK_TIERS; tier++) {
        if (fk_vector_reserve(&tree->freed[tier], (size_t)blocks * sizeof(int32_t)) != FK_DONE)
            return FK_NO_MEMORY;
        if (tree->track_removed && tree->tiers >> tier & 1 &&
            fk_vector_reserve(&tree->removed[tier], (size_t)blocks * FK_KEY_BYTES) != FK_DONE)
            return FK_NO_MEMORY;
    }
    return FK_DONE;
}

/* Notes what a tier is about to lose of a published run, from block `from` on. Needs reserve_for. */
static void note_removed(fk_tree *tree, const fk_run *run, int tier, int32_t from) {
    if (!tree->track_removed || run->writing || !run->slots[tier])
        return;
    for (int32_t i = from; i < run->length; i++)
        if (run->slots[tier][i] >= 0)
            fk_vector_append(&tree->removed[tier], run->keys + (size_t)FK_KEY_BYTES * (size_t)i, FK_KEY_BYTES);
}

/* Moves what is not -1 to the vector and leaves -1. In order: slots that are neighbours stay neighbours in the pool. */
static void let_go(fk_vector *freed, int32_t *slots, int32_t count) {
    int32_t *to = (int32_t *)((uint8_t *)freed->data + freed->used);
    const int32_t *begin = to;
    for (int32_t i = 0; i < count; i++) {
        *to = slots[i];
        to += slots[i] >= 0;
        slots[i] = -1;
    }
    freed->used += (size_t)(to - begin) * sizeof *to;
}

/* Lets the slots go and forgets the run, which has no children and is not in the table. Needs reserve_for. */
static void free_run(fk_tree *tree, int32_t id) {
    fk_run *run = fk_tree_run(tree, id);
    for (int tier = 0; tier < FK_TIERS; tier++)
        if (run->slots[tier])
            let_go(&tree->freed[tier], run->slots[tier], run->length);
    fk_unlink_child(tree, id);
    fk_forget_run(tree, id);
}

static int is_idle(const fk_run *run) {
    return run->detached && run->pins == 0 && run->children == 0;
}

int32_t fk_tree_leaf(const fk_tree *tree, int32_t id, int tier) {
    if (!(tree->tiers >> tier & 1))
        return -1;
    while (id >= 0 && !fk_tree_run(tree, id)->slots[tier])
        id = fk_tree_run(tree, id)->parent;
    return id >= 0 && fk_tree_evictable(tree, id, tier) ? id : -1;
}

void fk_tree_pin(fk_tree *tree, int32_t id) {
    fk_set_pins(tree, id, fk_tree_run(tree, id)->pins + 1);
}

int fk_tree_release(fk_tree *tree, int32_t id, int32_t *above) {
    fk_set_pins(tree, id, fk_tree_run(tree, id)->pins - 1);
    while (id >= 0 && is_idle(fk_tree_run(tree, id))) {
        fk_run *run = fk_tree_run(tree, id);
        int32_t parent = run->parent;
        if (reserve_for(tree, run->length) != FK_DONE)
            return FK_NO_MEMORY; /* the pin is gone; the run stays, detached, until its parent or a reset lets it go */
        free_run(tree, id);
        id = parent;
    }
    *above = id;
    return FK_DONE;
}

static void shrink_arrays(fk_run *run) {
    for (int tier = 0; tier < FK_TIERS; tier++)
        if (run->slots[tier]) {
            int32_t *slots = realloc(run->slots[tier], (size_t)run->length * sizeof *slots);
            if (slots)
                run->slots[tier] = slots;
        }
    uint8_t *keys = realloc(run->keys, (size_t)run->length * FK_KEY_BYTES);
    if (keys)
        run->keys = keys;
    run->capacity = run->length;
}

/* Down before sideways, without a stack: a path may be thousands of runs deep. */
static int32_t next_down(const fk_tree *tree, int32_t root, int32_t id) {
    const fk_run *run = fk_tree_run(tree, id);
    if (run->first_child >= 0)
        return run->first_child;
    for (; id != root; id = run->parent, run = fk_tree_run(tree, id))
        if (run->next >= 0)
            return run->next;
    return -1;
}

static int32_t deepest_first(const fk_tree *tree, int32_t id) {
    for (int32_t child; (child = fk_tree_run(tree, id)->first_child) >= 0;)
        id = child;
    return id;
}

/* Children before their parent. */
static int32_t next_up(const fk_tree *tree, int32_t root, int32_t id) {
    if (id == root)
        return -1;
    const fk_run *run = fk_tree_run(tree, id);
    return run->next >= 0 ? deepest_first(tree, run->next) : run->parent;
}

static void leave(fk_tree *tree, fk_run *run) {
    fk_table_remove(tree, run->head);
    run->detached = 1;
    tree->blocks -= run->length;
    for (int tier = 0; tier < FK_TIERS; tier++)
        note_removed(tree, run, tier, 0);
}

/* Room for what the run, and all below it if they leave as well, can let go; whatever follows can't fail then. */
static int reserve_below(fk_tree *tree, int32_t root, int all, fk_vector *gone) {
    int64_t blocks = 0, runs = 0;
    for (int32_t id = root; id >= 0; id = all ? next_down(tree, root, id) : -1, runs++)
        blocks += fk_tree_run(tree, id)->length;
    return reserve_for(tree, blocks) != FK_DONE ? FK_NO_MEMORY : fk_vector_reserve(gone, (size_t)runs * sizeof(int32_t));
}

int fk_tree_detach(fk_tree *tree, int32_t root, fk_vector *gone) {
    if (reserve_below(tree, root, 1, gone) != FK_DONE)
        return FK_NO_MEMORY;
    for (int32_t id = root; id >= 0; id = next_down(tree, root, id)) {
        fk_run *run = fk_tree_run(tree, id);
        if (run->detached)
            continue;
        leave(tree, run);
        fk_vector_append(gone, &id, sizeof id);
    }
    for (int32_t id = deepest_first(tree, root), next; id >= 0; id = next) {
        next = next_up(tree, root, id);
        if (is_idle(fk_tree_run(tree, id)))
            free_run(tree, id);
    }
    return FK_DONE;
}

/* The first block from `begin` on that no tier but this one holds, or the length. */
static int32_t first_hole(const fk_run *run, int without, int32_t begin) {
    const int32_t *others[FK_TIERS];
    int count = 0;
    for (int tier = 0; tier < FK_TIERS; tier++)
        if (tier != without && run->slots[tier])
            others[count++] = run->slots[tier];
    for (; begin < run->length; begin++) {
        int held = 0;
        for (int i = 0; i < count; i++)
            held |= others[i][begin] >= 0;
        if (!held)
            break;
    }
    return begin;
}

/* Forgets the blocks from `keep` on, at least one of which stays. */
static void trim(fk_tree *tree, int32_t id, int32_t keep) {
    fk_run *run = fk_tree_run(tree, id);
    int32_t cut = run->length - keep;
    for (int tier = 0; tier < FK_TIERS; tier++) {
        note_removed(tree, run, tier, keep);
        if (run->slots[tier])
            let_go(&tree->freed[tier], run->slots[tier] + keep, cut);
    }
    tree->blocks -= cut;
    run->length = keep;
    fk_set_ends(run);
    if (keep <= run->capacity / 2)
        shrink_arrays(run);
}

/* Cuts a run, which is not busy, before its block `keep`; all that is below leaves as well. Needs room in the vectors. */
static void cut(fk_tree *tree, int32_t id, int32_t keep, fk_vector *gone) {
    fk_run *run = fk_tree_run(tree, id);
    while (run->first_child >= 0)
        fk_tree_detach(tree, run->first_child, gone);
    if (keep > 0) {
        trim(tree, id, keep);
        return;
    }
    leave(tree, run);
    fk_vector_append(gone, &id, sizeof id);
    free_run(tree, id);
}

/* One run, which is evictable. */
static int evict_run(fk_tree *tree, int32_t id, int tier, int64_t want, fk_eviction *result, fk_vector *gone) {
    fk_run *run = fk_tree_run(tree, id);
    int32_t *slots = run->slots[tier], parent = run->parent, left = slots ? run->length : 0;
    int64_t freed = 0;
    while (left > 0 && freed < want)
        freed += slots[--left] >= 0;
    while (left > 0 && slots[left - 1] < 0)
        left--;
    int32_t keep = first_hole(run, tier, left);
    if (reserve_below(tree, id, keep < run->length, gone) != FK_DONE)
        return FK_NO_MEMORY;
    note_removed(tree, run, tier, left);
    if (slots)
        let_go(&tree->freed[tier], slots + left, run->length - left);
    if (slots && left == 0) {
        fk_set_array(tree, id, tier, NULL);
        free(slots);
    }
    result->freed += freed;
    result->done += left == 0;
    result->above = keep == 0 ? parent : keep < run->length || left == 0 ? id : -1;
    if (keep < run->length)
        cut(tree, id, keep, gone);
    return FK_DONE;
}

/* A run's arrays and its neighbours in the list of children, none of which was touched for a long time if it is a victim. */
static void prefetch_run(const fk_tree *tree, int32_t id, int tier) {
    const fk_run *run = fk_tree_run(tree, id);
    __builtin_prefetch(run->slots[tier], 1);
    __builtin_prefetch(run->keys, 1);
    fk_table_prefetch(tree, run->head);
    if (run->prev >= 0)
        __builtin_prefetch(fk_tree_run(tree, run->prev), 1);
    if (run->next >= 0)
        __builtin_prefetch(fk_tree_run(tree, run->next), 1);
}

int fk_tree_evict(fk_tree *tree, const int32_t *ids, int64_t count, int tier, int64_t want, fk_eviction *result, fk_vector *gone) {
    *result = (fk_eviction){0, 0, 0, -1};
    for (int64_t i = 0; i < count; i++)
        if (fk_tree_has(tree, ids[i]))
            prefetch_run(tree, ids[i], tier);
    for (int64_t i = 0; i < count && result->done == i && result->freed < want && result->above < 0; i++) {
        if (!fk_tree_has(tree, ids[i]))
            break;
        result->blocked = !fk_tree_evictable(tree, ids[i], tier);
        if (result->blocked)
            break;
        if (evict_run(tree, ids[i], tier, want - result->freed, result, gone) != FK_DONE)
            return i ? FK_DONE : FK_NO_MEMORY; /* what has left already must be told */
    }
    return FK_DONE;
}
