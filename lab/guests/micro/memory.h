/*
 * memory: where everything is in the microguest's physical memory.
 *
 * Shared by C, the assembler and the linker script, so it holds nothing but definitions.
 * build.py is the host's side of the addresses that it reads and writes; a test compares them.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef LAB_MICRO_MEMORY_H
#define LAB_MICRO_MEMORY_H

#define ROM_ADDRESS 0xf0000
/* What the host has written into its copy of the ROM. */
#define PARAMETERS_ADDRESS 0xfff00
#define RESET_ADDRESS 0xffff0
#define IMAGE_ADDRESS 0x100000

#define PROGRESS_ADDRESS 0x200000
#define LATENCY_ADDRESS 0x201000

#define STACKS_ADDRESS 0x300000
#define STACK_SHIFT 12

/* From here on memory is given out: page tables, versions, counts, the working set. */
#define FREE_ADDRESS 0x400000

#endif
