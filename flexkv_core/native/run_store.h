/* Where the runs of the tree live: ids, arrays, links between parent and child, and the table head -> run. Used by run_tree.c only. */
#ifndef FLEXKV_RUN_STORE_H
#define FLEXKV_RUN_STORE_H

#include "run_tree.h"

#include <string.h>

static inline int fk_same_key(const uint8_t *a, const uint8_t *b) {
    uint64_t a0, a1, b0, b1;
    memcpy(&a0, a, 8);
    memcpy(&a1, a + 8, 8);
    memcpy(&b0, b, 8);
    memcpy(&b1, b + 8, 8);
    return ((a0 ^ b0) | (a1 ^ b1)) == 0;
}

void fk_vector_append(fk_vector *vector, const void *data, size_t bytes); /* room was reserved */

/* Enters a run under its head, or names another run for that head. */
void fk_table_set(fk_tree *tree, int32_t id);
void fk_table_remove(fk_tree *tree, const uint8_t *head);
static inline void fk_table_prefetch(const fk_tree *tree, const uint8_t *head); /* where fk_table_remove will look */

static inline int fk_holds(const fk_run *run, int tier) {
    return run->slots[tier] != NULL || run->children_in[tier] > 0;
}

static inline int fk_busy(const fk_run *run) {
    return run->pins > 0 || run->busy_children > 0;
}

static inline uint32_t fk_hash_of(const uint8_t *key) {
    /* Keys are digests as a rule, but nothing depends on it: a multiplication spreads keys that differ in a few bits only. */
    uint64_t a, b;
    memcpy(&a, key, 8);
    memcpy(&b, key + 8, 8);
    return (uint32_t)(((a ^ (b << 32 | b >> 32)) * 0x9E3779B97F4A7C15u) >> 32);
}

static inline void fk_table_prefetch(const fk_tree *tree, const uint8_t *head) {
    __builtin_prefetch(tree->table + (fk_hash_of(head) & (tree->table_size - 1)), 1);
}

/* These keep the parents' children_in and busy_children right. */
void fk_set_array(fk_tree *tree, int32_t id, int tier, int32_t *slots); /* what was there is the caller's */
void fk_set_pins(fk_tree *tree, int32_t id, int32_t pins);
void fk_link_child(fk_tree *tree, int32_t parent, int32_t id);
void fk_unlink_child(fk_tree *tree, int32_t id);

void *fk_copy_of(const void *data, size_t bytes);
void fk_free_arrays(uint8_t *keys, int32_t *const slots[FK_TIERS]);
void fk_set_ends(fk_run *run); /* head and tail, from the keys */

/* An entry with no place in the tree yet, and room for it in the table; takes over keys and slots. -1: no memory, and the caller still
 * owns them. */
int32_t fk_new_run(fk_tree *tree, uint8_t *keys, int32_t length, int32_t *const slots[FK_TIERS]);
void fk_forget_run(fk_tree *tree, int32_t id);

#endif
