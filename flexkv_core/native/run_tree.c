#include "run_store.h"

#include <stdlib.h>
#include <string.h>

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
    tree->tiers |= 1u << tier;
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

/* The run's slots in a tier; an array of -1 where there was none. NULL: no memory. */
static int32_t *array_of(fk_tree *tree, int32_t id, int tier) {
    fk_run *run = fk_tree_run(tree, id);
    if (!run->slots[tier]) {
        int32_t *slots = malloc((size_t)run->capacity * sizeof *slots);
        if (!slots)
            return NULL;
        memset(slots, 0xff, (size_t)run->capacity * sizeof *slots); /* -1 */
        fk_set_array(tree, id, tier, slots);
    }
    return run->slots[tier];
}

int fk_tree_set_slots(fk_tree *tree, int32_t id, int tier, int32_t at, const int32_t *slots, int32_t count) {
    int32_t *array = array_of(tree, id, tier);
    if (!array)
        return FK_NO_MEMORY;
    memcpy(array + at, slots, (size_t)count * sizeof *slots);
    return FK_DONE;
}

static int any_slot(const int32_t *slots, int32_t count) {
    for (int32_t i = 0; i < count; i++)
        if (slots[i] >= 0)
            return 1;
    return 0;
}

/* Blocks [begin, end) of one run. */
static int fill_piece(fk_tree *tree, int32_t id, int32_t begin, int32_t end, int tier, int32_t *slots, fk_vector *gained) {
    const fk_run *run = fk_tree_run(tree, id);
    int had = run->slots[tier] != NULL;
    if (run->detached || (!had && !any_slot(slots, end - begin)))
        return FK_DONE;
    if (!had && fk_vector_reserve(gained, sizeof id) != FK_DONE)
        return FK_NO_MEMORY;
    int32_t *array = array_of(tree, id, tier);
    if (!array)
        return FK_NO_MEMORY;
    if (!had)
        fk_vector_append(gained, &id, sizeof id);
    for (int32_t i = 0; i < end - begin; i++) {
        int32_t *now = array + begin + i;
        if (slots[i] >= 0 && *now < 0) {
            *now = slots[i];
            slots[i] = FK_NOT_THERE;
        } else if (slots[i] < 0 && *now == FK_ON_ITS_WAY) {
            *now = FK_NOT_THERE;
        }
    }
    return FK_DONE;
}

int fk_tree_fill(fk_tree *tree, int32_t id, int64_t skip, int tier, int32_t *slots, int64_t count, fk_vector *gained) {
    int64_t there = -skip;
    for (int32_t step = id; step >= 0 && there < count; step = fk_tree_run(tree, step)->parent)
        there += fk_tree_run(tree, step)->length;
    if (there < count)
        return FK_TOO_FEW;
    int64_t end = fk_tree_run(tree, id)->length - skip; /* where the piece ends in this run; not positive: it ends further up */
    int status = FK_DONE;
    while (count > 0 && status == FK_DONE) {
        if (end > 0) {
            int64_t begin = end > count ? end - count : 0;
            count -= end - begin;
            status = fill_piece(tree, id, (int32_t)begin, (int32_t)end, tier, slots + count, gained);
            end = 0;
        }
        id = fk_tree_run(tree, id)->parent;
        end += id >= 0 ? fk_tree_run(tree, id)->length : 0;
    }
    return status;
}

int64_t fk_tree_missing(const fk_tree *tree, int32_t id, int have, int lack, int64_t *at, int64_t limit) {
    const fk_run *run = fk_tree_run(tree, id);
    const int32_t *there = run->slots[have], *lacking = run->slots[lack];
    int64_t begin = there ? *at : run->length, end;
    while (begin < run->length && (there[begin] < 0 || (lacking && lacking[begin] != FK_NOT_THERE)))
        begin++;
    for (end = begin; end < run->length && end - begin < limit; end++)
        if (there[end] < 0 || (lacking && lacking[end] != FK_NOT_THERE))
            break;
    *at = begin;
    return end - begin;
}

/* One bit a slot: a look at a million slots costs a millisecond, however many are searched. */
static uint8_t *bits_of(const int32_t *slots, int64_t count, int32_t *highest) {
    *highest = -1;
    for (int64_t i = 0; i < count; i++)
        if (slots[i] > *highest)
            *highest = slots[i];
    uint8_t *bits = calloc(((size_t)*highest + 1) / 8 + 1, 1);
    for (int64_t i = 0; bits && i < count; i++)
        if (slots[i] >= 0)
            bits[slots[i] / 8] |= (uint8_t)(1u << slots[i] % 8);
    return bits;
}

int fk_tree_locate(const fk_tree *tree, int tier, const int32_t *slots, int64_t count, fk_vector *found) {
    int32_t highest;
    uint8_t *bits = bits_of(slots, count, &highest);
    int status = bits ? FK_DONE : FK_NO_MEMORY;
    for (int32_t id = 0; status == FK_DONE && id < tree->chunk_count * FK_CHUNK_RUNS; id++) {
        const fk_run *run = fk_tree_run(tree, id);
        if (!run->used || run->detached || !run->slots[tier])
            continue;
        for (int32_t at = 0; at < run->length; at++) {
            int32_t slot = run->slots[tier][at], place[3] = {id, at, slot};
            if (slot < 0 || slot > highest || !(bits[slot / 8] >> slot % 8 & 1))
                continue;
            if ((status = fk_vector_reserve(found, sizeof place)) != FK_DONE)
                break;
            memcpy((char *)found->data + found->used, place, sizeof place);
            found->used += sizeof place;
        }
    }
    free(bits);
    return status;
}
