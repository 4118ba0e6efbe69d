#include "run_store.h"

#include <malloc.h>
#include <stdlib.h>
#include <string.h>

/* ---- small things ------------------------------------------------------------------------------------------------------------ */

int fk_vector_reserve(fk_vector *vector, size_t more) {
    if (vector->capacity - vector->used >= more)
        return FK_DONE;
    size_t wanted = vector->used + more;
    if (wanted < 2 * vector->capacity)
        wanted = 2 * vector->capacity;
    void *data = realloc(vector->data, wanted);
    if (!data)
        return FK_NO_MEMORY;
    vector->data = data;
    vector->capacity = wanted;
    return FK_DONE;
}

void fk_vector_append(fk_vector *vector, const void *data, size_t bytes) {
    memcpy((uint8_t *)vector->data + vector->used, data, bytes);
    vector->used += bytes;
}

int fk_tree_has(const fk_tree *tree, int64_t id) {
    return id >= 0 && id < (int64_t)tree->chunk_count * FK_CHUNK_RUNS && fk_tree_run(tree, (int32_t)id)->used;
}

int fk_tree_evictable(const fk_tree *tree, int32_t id, int tier) {
    const fk_run *run = fk_tree_run(tree, id);
    return !run->writing && !run->detached && !fk_busy(run) && run->children_in[tier] == 0;
}

/* ---- the table head -> run --------------------------------------------------------------------------------------------------- */

static size_t table_place(const fk_tree *tree, const uint8_t *head) {
    uint32_t hash = fk_hash_of(head);
    size_t mask = tree->table_size - 1, at = hash & mask;
    for (uint64_t entry; (entry = tree->table[at]) != 0; at = (at + 1) & mask)
        if (entry >> 32 == hash && fk_same_key(fk_tree_run(tree, (int32_t)(uint32_t)entry - 1)->head, head))
            break;
    return at; /* of the entry, or of the empty place where it would go */
}

int32_t fk_tree_find(const fk_tree *tree, const uint8_t *head) {
    return (int32_t)(uint32_t)tree->table[table_place(tree, head)] - 1;
}

/* Room for one more entry; at most 3/4 of the places are taken. */
static int table_reserve(fk_tree *tree) {
    if (4 * (tree->run_count + 1) <= 3 * tree->table_size)
        return FK_DONE;
    size_t size = 2 * tree->table_size;
    uint64_t *table = calloc(size, sizeof *table);
    if (!table)
        return FK_NO_MEMORY;
    for (size_t i = 0; i < tree->table_size; i++) {
        uint64_t entry = tree->table[i];
        if (!entry)
            continue;
        size_t at = (entry >> 32) & (size - 1);
        while (table[at])
            at = (at + 1) & (size - 1);
        table[at] = entry;
    }
    free(tree->table);
    tree->table = table;
    tree->table_size = size;
    return FK_DONE;
}

void fk_table_set(fk_tree *tree, int32_t id) {
    const uint8_t *head = fk_tree_run(tree, id)->head;
    size_t at = table_place(tree, head);
    tree->run_count += tree->table[at] == 0;
    tree->table[at] = (uint64_t)fk_hash_of(head) << 32 | (uint32_t)(id + 1);
}

/* Removes by moving later entries of the cluster back, so that no tombstones gather. */
void fk_table_remove(fk_tree *tree, const uint8_t *head) {
    size_t mask = tree->table_size - 1, hole = table_place(tree, head);
    for (size_t at = (hole + 1) & mask; tree->table[at]; at = (at + 1) & mask) {
        size_t home = (tree->table[at] >> 32) & mask;
        if (((at - home) & mask) >= ((at - hole) & mask)) {
            tree->table[hole] = tree->table[at];
            hole = at;
        }
    }
    tree->table[hole] = 0;
    tree->run_count--;
}

/* ---- runs -------------------------------------------------------------------------------------------------------------------- */

static int add_chunk(fk_tree *tree) {
    fk_run **chunks = realloc(tree->chunks, (size_t)(tree->chunk_count + 1) * sizeof *chunks);
    if (!chunks)
        return FK_NO_MEMORY;
    tree->chunks = chunks;
    fk_run *chunk = calloc(FK_CHUNK_RUNS, sizeof *chunk);
    if (!chunk)
        return FK_NO_MEMORY;
    int32_t first = tree->chunk_count * FK_CHUNK_RUNS;
    for (int32_t i = 0; i < FK_CHUNK_RUNS; i++)
        chunk[i].first_child = i + 1 < FK_CHUNK_RUNS ? first + i + 1 : tree->unused;
    tree->chunks[tree->chunk_count++] = chunk;
    tree->unused = first;
    return FK_DONE;
}

static int32_t *first_child_of(fk_tree *tree, int32_t parent) {
    return parent < 0 ? &tree->first_root : &fk_tree_run(tree, parent)->first_child;
}

/* A child of `id` began (1) or ceased (-1) to hold slots in the tier. Climbs as far as that changes something. */
static void child_holds(fk_tree *tree, int32_t id, int tier, int change) {
    while (id >= 0) {
        fk_run *run = fk_tree_run(tree, id);
        int before = fk_holds(run, tier);
        run->children_in[tier] += change;
        if (fk_holds(run, tier) == before)
            break;
        id = run->parent;
    }
}

static void child_is_busy(fk_tree *tree, int32_t id, int change) {
    while (id >= 0) {
        fk_run *run = fk_tree_run(tree, id);
        int before = fk_busy(run);
        run->busy_children += change;
        if (fk_busy(run) == before)
            break;
        id = run->parent;
    }
}

static void tell_parent(fk_tree *tree, const fk_run *run, int change) {
    for (int tier = 0; tier < FK_TIERS; tier++)
        if (fk_holds(run, tier))
            child_holds(tree, run->parent, tier, change);
    if (fk_busy(run))
        child_is_busy(tree, run->parent, change);
}

void fk_set_array(fk_tree *tree, int32_t id, int tier, int32_t *slots) {
    fk_run *run = fk_tree_run(tree, id);
    int before = fk_holds(run, tier);
    run->slots[tier] = slots;
    int change = fk_holds(run, tier) - before;
    if (change)
        child_holds(tree, run->parent, tier, change);
    tree->tiers |= 1u << tier;
}

void fk_set_pins(fk_tree *tree, int32_t id, int32_t pins) {
    fk_run *run = fk_tree_run(tree, id);
    int before = fk_busy(run);
    run->pins = pins;
    int change = fk_busy(run) - before;
    if (change)
        child_is_busy(tree, run->parent, change);
}

void fk_link_child(fk_tree *tree, int32_t parent, int32_t id) {
    fk_run *run = fk_tree_run(tree, id);
    int32_t *first = first_child_of(tree, parent);
    run->parent = parent;
    run->prev = -1;
    run->next = *first;
    if (*first >= 0)
        fk_tree_run(tree, *first)->prev = id;
    *first = id;
    if (parent >= 0)
        fk_tree_run(tree, parent)->children++;
    tell_parent(tree, run, 1);
}

void fk_unlink_child(fk_tree *tree, int32_t id) {
    fk_run *run = fk_tree_run(tree, id);
    if (run->prev >= 0)
        fk_tree_run(tree, run->prev)->next = run->next;
    else
        *first_child_of(tree, run->parent) = run->next;
    if (run->next >= 0)
        fk_tree_run(tree, run->next)->prev = run->prev;
    if (run->parent >= 0)
        fk_tree_run(tree, run->parent)->children--;
    tell_parent(tree, run, -1);
}

void *fk_copy_of(const void *data, size_t bytes) {
    void *copy = malloc(bytes);
    if (copy)
        memcpy(copy, data, bytes);
    return copy;
}

void fk_free_arrays(uint8_t *keys, int32_t *const slots[FK_TIERS]) {
    free(keys);
    for (int tier = 0; tier < FK_TIERS; tier++)
        free(slots[tier]);
}

void fk_set_ends(fk_run *run) {
    memcpy(run->head, run->keys, FK_KEY_BYTES);
    memcpy(run->tail, run->keys + (size_t)FK_KEY_BYTES * (size_t)(run->length - 1), FK_KEY_BYTES);
}

int32_t fk_new_run(fk_tree *tree, uint8_t *keys, int32_t length, int32_t *const slots[FK_TIERS]) {
    if (table_reserve(tree) != FK_DONE || (tree->unused < 0 && add_chunk(tree) != FK_DONE))
        return -1;
    int32_t id = tree->unused;
    fk_run *run = fk_tree_run(tree, id);
    tree->unused = run->first_child;
    memset(run, 0, sizeof *run);
    run->used = 1;
    run->first_child = run->next = run->prev = -1;
    run->keys = keys;
    run->length = run->capacity = length;
    memcpy(run->slots, slots, sizeof run->slots);
    fk_set_ends(run);
    return id;
}

void fk_forget_run(fk_tree *tree, int32_t id) {
    fk_run *run = fk_tree_run(tree, id);
    fk_free_arrays(run->keys, run->slots);
    memset(run, 0, sizeof *run);
    run->first_child = tree->unused;
    tree->unused = id;
}

/* ---- as a whole -------------------------------------------------------------------------------------------------------------- */

int fk_tree_init(fk_tree *tree, int track_removed) {
    memset(tree, 0, sizeof *tree);
    tree->unused = tree->first_root = -1;
    tree->track_removed = track_removed;
    tree->table_size = 1024;
    tree->table = calloc(tree->table_size, sizeof *tree->table);
    return tree->table ? FK_DONE : FK_NO_MEMORY;
}

void fk_tree_destroy(fk_tree *tree) {
    for (int32_t c = 0; c < tree->chunk_count; c++) {
        for (int32_t i = 0; i < FK_CHUNK_RUNS; i++)
            fk_free_arrays(tree->chunks[c][i].keys, tree->chunks[c][i].slots);
        free(tree->chunks[c]);
    }
    free(tree->chunks);
    free(tree->table);
    for (int tier = 0; tier < FK_TIERS; tier++)
        free(tree->freed[tier].data);
    for (int tier = 0; tier < FK_TIERS; tier++)
        free(tree->removed[tier].data);
    memset(tree, 0, sizeof *tree);
}

static size_t allocated(void *data) {
    return data ? malloc_usable_size(data) + sizeof(size_t) : 0; /* glibc keeps one word before each piece */
}

size_t fk_tree_memory(const fk_tree *tree) {
    size_t total = allocated(tree->chunks) + allocated(tree->table);
    for (int tier = 0; tier < FK_TIERS; tier++)
        total += allocated(tree->removed[tier].data);
    for (int tier = 0; tier < FK_TIERS; tier++)
        total += allocated(tree->freed[tier].data);
    for (int32_t c = 0; c < tree->chunk_count; c++) {
        total += allocated(tree->chunks[c]);
        for (int32_t i = 0; i < FK_CHUNK_RUNS; i++) {
            const fk_run *run = &tree->chunks[c][i];
            total += allocated(run->keys);
            for (int tier = 0; tier < FK_TIERS; tier++)
                total += allocated(run->slots[tier]);
        }
    }
    return total;
}
