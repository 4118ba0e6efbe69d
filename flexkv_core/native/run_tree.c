#include "run_store.h"

#include <stdlib.h>
#include <string.h>

/* Room in the vectors for all that this run can let go: whatever follows can't fail then. */
static int reserve_for(fk_tree *tree, int64_t blocks) {
    for (int tier = 0; tier < FK_TIERS; tier++)
        if (fk_vector_reserve(&tree->freed[tier], (size_t)blocks * sizeof(int32_t)) != FK_DONE)
            return FK_NO_MEMORY;
    return tree->track_removed ? fk_vector_reserve(&tree->removed, (size_t)blocks * FK_KEY_BYTES) : FK_DONE;
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

/* ---- finding and shaping ----------------------------------------------------------------------------------------------------- */

/* How many of the run's first `limit` keys equal the query's; the first one is known to be equal. Legal because keys are chained. */
static int32_t agreement(const fk_run *run, const uint8_t *keys, int32_t limit) {
    int32_t low = 1, high = limit;
    while (low < high) {
        int32_t middle = low + (high - low + 1) / 2;
        size_t offset = (size_t)FK_KEY_BYTES * (size_t)(middle - 1);
        if (fk_same_key(run->keys + offset, keys + offset))
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static void copy_slots(const fk_run *run, int tier, int32_t from, int32_t to, int32_t *out) {
    const int32_t *slots = run->slots[tier];
    if (slots)
        memcpy(out, slots + from, (size_t)(to - from) * sizeof *out);
    else
        memset(out, 0xff, (size_t)(to - from) * sizeof *out); /* -1 */
}

/* The run below `parent` whose head is given. The first child is tried before the table: most runs have one, and it is at hand. */
static int32_t child_of(const fk_tree *tree, int32_t parent, const uint8_t *head) {
    if (parent >= 0) {
        int32_t first = fk_tree_run(tree, parent)->first_child;
        if (first < 0)
            return -1;
        const fk_run *run = fk_tree_run(tree, first);
        if (!run->detached && fk_same_key(run->head, head))
            return first;
    }
    int32_t id = fk_tree_find(tree, head);
    /* A head whose parent is another run: the caller's keys are not chained. Stop rather than jump. */
    return id >= 0 && fk_tree_run(tree, id)->parent == parent ? id : -1;
}

fk_match fk_tree_match(const fk_tree *tree, const uint8_t *keys, int64_t total, int64_t start, int32_t *out, int tier,
                       int through_writing) {
    fk_match found = {0, -1, 0};
    while (found.blocks < total) {
        const uint8_t *query = keys + FK_KEY_BYTES * found.blocks;
        int32_t id = child_of(tree, found.run, query);
        if (id < 0)
            break;
        const fk_run *run = fk_tree_run(tree, id);
        if (run->writing && !through_writing)
            break;
        if (run->first_child >= 0)
            __builtin_prefetch(fk_tree_run(tree, run->first_child));
        int64_t rest = total - found.blocks;
        int32_t take = run->length;
        if (take > rest || !fk_same_key(run->tail, query + (size_t)FK_KEY_BYTES * (size_t)(take - 1)))
            take = agreement(run, query, take > rest ? (int32_t)rest : take);
        if (out && found.blocks + take > start) {
            int32_t skip = start > found.blocks ? (int32_t)(start - found.blocks) : 0;
            copy_slots(run, tier, skip, take, out + (found.blocks + skip - start));
        }
        found.blocks += take;
        found.run = id;
        found.at = take;
        if (take < run->length)
            break;
    }
    return found;
}

int fk_tree_insert(fk_tree *tree, int32_t parent, const uint8_t *keys, int32_t length, int tier, const int32_t *slots, int32_t *id) {
    int32_t *arrays[FK_TIERS] = {NULL};
    uint8_t *own_keys = fk_copy_of(keys, (size_t)length * FK_KEY_BYTES);
    arrays[tier] = fk_copy_of(slots, (size_t)length * sizeof *slots);
    int32_t made = own_keys && arrays[tier] ? fk_new_run(tree, own_keys, length, arrays) : -1;
    if (made < 0) {
        fk_free_arrays(own_keys, arrays);
        return FK_NO_MEMORY;
    }
    fk_run *run = fk_tree_run(tree, made);
    run->writing = 1;
    run->pins = 1;
    fk_link_child(tree, parent, made);
    fk_table_set(tree, made);
    tree->blocks += length;
    *id = made;
    return FK_DONE;
}

/* Copies of the blocks [from, to) of a run's arrays; 0 and nothing kept where memory is short. */
static int copy_arrays(const fk_run *run, int32_t from, int32_t to, uint8_t **keys, int32_t *slots[FK_TIERS]) {
    size_t count = (size_t)(to - from);
    int complete = (*keys = fk_copy_of(run->keys + (size_t)FK_KEY_BYTES * (size_t)from, count * FK_KEY_BYTES)) != NULL;
    for (int tier = 0; tier < FK_TIERS; tier++) {
        slots[tier] = run->slots[tier] ? fk_copy_of(run->slots[tier] + from, count * sizeof(int32_t)) : NULL;
        complete &= slots[tier] != NULL || !run->slots[tier];
    }
    if (!complete)
        fk_free_arrays(*keys, slots);
    return complete;
}

static void replace_arrays(fk_run *run, uint8_t *keys, int32_t *const slots[FK_TIERS], int32_t length) {
    fk_free_arrays(run->keys, run->slots);
    run->keys = keys;
    memcpy(run->slots, slots, sizeof run->slots);
    run->length = run->capacity = length;
    fk_set_ends(run);
}

int fk_tree_split(fk_tree *tree, int32_t id, int32_t at, int32_t *head_id) {
    fk_run *tail = fk_tree_run(tree, id);
    uint8_t *head_keys, *tail_keys;
    int32_t *head_slots[FK_TIERS], *tail_slots[FK_TIERS];
    if (!copy_arrays(tail, 0, at, &head_keys, head_slots))
        return FK_NO_MEMORY;
    if (!copy_arrays(tail, at, tail->length, &tail_keys, tail_slots)) {
        fk_free_arrays(head_keys, head_slots);
        return FK_NO_MEMORY;
    }
    int32_t made = fk_new_run(tree, head_keys, at, head_slots);
    if (made < 0) {
        fk_free_arrays(head_keys, head_slots);
        fk_free_arrays(tail_keys, tail_slots);
        return FK_NO_MEMORY;
    }
    fk_tree_run(tree, made)->writing = tail->writing;
    int32_t parent = tail->parent;
    fk_unlink_child(tree, id);
    fk_link_child(tree, parent, made);
    fk_table_set(tree, made); /* in place of the tail, which had this head */
    replace_arrays(tail, tail_keys, tail_slots, tail->length - at);
    fk_link_child(tree, made, id);
    fk_table_set(tree, id);
    *head_id = made;
    return FK_DONE;
}

static int can_merge(const fk_tree *tree, const fk_run *tail, int64_t blocks_max) {
    if (tail->parent < 0 || tail->detached || tail->writing)
        return 0;
    const fk_run *head = fk_tree_run(tree, tail->parent);
    return !head->writing && head->pins == 0 && head->children == 1 && (int64_t)head->length + tail->length <= blocks_max;
}

/* Slots of head and tail, one after the other; -1 where one of them never had the tier. */
static int32_t *joined_slots(const fk_run *head, const fk_run *tail, int tier) {
    size_t count = (size_t)(head->length + tail->length);
    int32_t *slots = malloc(count * sizeof *slots);
    if (!slots)
        return NULL;
    copy_slots(head, tier, 0, head->length, slots);
    copy_slots(tail, tier, 0, tail->length, slots + head->length);
    return slots;
}

int fk_tree_merge(fk_tree *tree, int32_t id, int64_t blocks_max, int32_t *absorbed) {
    fk_run *tail = fk_tree_run(tree, id);
    *absorbed = -1;
    if (!can_merge(tree, tail, blocks_max))
        return FK_DONE;
    int32_t head_id = tail->parent;
    fk_run *head = fk_tree_run(tree, head_id);
    size_t head_bytes = (size_t)head->length * FK_KEY_BYTES, tail_bytes = (size_t)tail->length * FK_KEY_BYTES;
    int32_t *slots[FK_TIERS] = {NULL};
    uint8_t *keys = malloc(head_bytes + tail_bytes);
    int complete = keys != NULL;
    for (int tier = 0; tier < FK_TIERS; tier++)
        if (head->slots[tier] || tail->slots[tier])
            complete &= (slots[tier] = joined_slots(head, tail, tier)) != NULL;
    if (!complete) {
        fk_free_arrays(keys, slots);
        return FK_NO_MEMORY;
    }
    memcpy(keys, head->keys, head_bytes);
    memcpy(keys + head_bytes, tail->keys, tail_bytes);
    fk_table_remove(tree, tail->head);
    fk_unlink_child(tree, id);
    int32_t parent = head->parent;
    fk_unlink_child(tree, head_id);
    replace_arrays(tail, keys, slots, head->length + tail->length);
    fk_link_child(tree, parent, id);
    fk_table_set(tree, id); /* in place of the head */
    fk_forget_run(tree, head_id);
    *absorbed = head_id;
    return FK_DONE;
}

int fk_tree_set_slots(fk_tree *tree, int32_t id, int tier, int32_t at, const int32_t *slots, int32_t count) {
    fk_run *run = fk_tree_run(tree, id);
    if (!run->slots[tier]) {
        run->slots[tier] = malloc((size_t)run->capacity * sizeof *slots);
        if (!run->slots[tier])
            return FK_NO_MEMORY;
        memset(run->slots[tier], 0xff, (size_t)run->capacity * sizeof *slots); /* -1 */
    }
    memcpy(run->slots[tier] + at, slots, (size_t)count * sizeof *slots);
    return FK_DONE;
}

int fk_tree_release(fk_tree *tree, int32_t id, int32_t *leaf) {
    fk_tree_run(tree, id)->pins--;
    while (id >= 0 && is_idle(fk_tree_run(tree, id))) {
        fk_run *run = fk_tree_run(tree, id);
        int32_t parent = run->parent;
        if (reserve_for(tree, run->length) != FK_DONE)
            return FK_NO_MEMORY; /* the pin is gone; the run stays, detached, until its parent or a reset lets it go */
        free_run(tree, id);
        id = parent;
    }
    *leaf = id >= 0 && fk_tree_evictable(tree, id) ? id : -1;
    return FK_DONE;
}

/* ---- letting go -------------------------------------------------------------------------------------------------------------- */

static int in_some_tier(const fk_run *run, int32_t block) {
    for (int tier = 0; tier < FK_TIERS; tier++)
        if (run->slots[tier] && run->slots[tier][block] >= 0)
            return 1;
    return 0;
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

static int only_tier(const fk_run *run, int tier) {
    for (int other = 0; other < FK_TIERS; other++)
        if (other != tier && run->slots[other])
            return 0;
    return 1;
}

/* `tier` has let go of all blocks from `left` on. Cuts off the tail of blocks that no tier holds; forgets a run of which nothing is
 * left. Returns whether the run is gone. */
static int cut_holes(fk_tree *tree, int32_t id, int tier, int32_t left) {
    fk_run *run = fk_tree_run(tree, id);
    int32_t keep = only_tier(run, tier) ? left : run->length;
    while (keep > 0 && !in_some_tier(run, keep - 1))
        keep--;
    if (tree->track_removed && keep < run->length)
        fk_vector_append(&tree->removed, run->keys + (size_t)FK_KEY_BYTES * (size_t)keep, (size_t)(run->length - keep) * FK_KEY_BYTES);
    tree->blocks -= run->length - keep;
    run->length = keep;
    if (keep == 0) {
        fk_table_remove(tree, run->head);
        free_run(tree, id);
        return 1;
    }
    fk_set_ends(run);
    if (keep <= run->capacity / 2)
        shrink_arrays(run);
    return 0;
}

int fk_tree_evict(fk_tree *tree, int32_t id, int tier, int64_t want, fk_eviction *result) {
    fk_run *run = fk_tree_run(tree, id);
    *result = (fk_eviction){-1, run->length, -1};
    if (!fk_tree_evictable(tree, id))
        return FK_DONE;
    if (reserve_for(tree, run->length) != FK_DONE)
        return FK_NO_MEMORY;
    int32_t *slots = run->slots[tier], parent = run->parent, left = slots ? run->length : 0;
    int64_t freed = 0;
    while (left > 0 && freed < want)
        freed += slots[--left] >= 0;
    if (slots)
        let_go(&tree->freed[tier], slots + left, run->length - left);
    int gone = cut_holes(tree, id, tier, left);
    result->freed = freed;
    result->left = gone ? 0 : left;
    result->leaf = gone && parent >= 0 && fk_tree_evictable(tree, parent) ? parent : -1;
    return FK_DONE;
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
    if (tree->track_removed && !run->writing)
        fk_vector_append(&tree->removed, run->keys, (size_t)run->length * FK_KEY_BYTES);
}

int fk_tree_detach(fk_tree *tree, int32_t root, fk_vector *left) {
    int64_t blocks = 0, runs = 0;
    for (int32_t id = root; id >= 0; id = next_down(tree, root, id), runs++)
        blocks += fk_tree_run(tree, id)->length;
    if (reserve_for(tree, blocks) != FK_DONE || fk_vector_reserve(left, (size_t)runs * sizeof(int32_t)) != FK_DONE)
        return FK_NO_MEMORY;
    for (int32_t id = root; id >= 0; id = next_down(tree, root, id)) {
        fk_run *run = fk_tree_run(tree, id);
        if (run->detached)
            continue;
        leave(tree, run);
        fk_vector_append(left, &id, sizeof id);
    }
    for (int32_t id = deepest_first(tree, root), next; id >= 0; id = next) {
        next = next_up(tree, root, id);
        if (is_idle(fk_tree_run(tree, id)))
            free_run(tree, id);
    }
    return FK_DONE;
}
