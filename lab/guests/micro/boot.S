/*
 * boot: from the reset vector to ring 3, in the fewest instructions that do it.
 *
 * The ROM is 64 KiB at 0xf0000, which a PC also shows at the top of 4 GiB, where a processor
 * starts.  The boot processor copies the image to RAM.  All processors then go from real mode over
 * protected to long mode, and leave ring 0 for good with an IRETQ: no interrupt ever comes (IF is
 * 0), and an exception finds no handler, which resets the machine, so that QEMU ends.
 *
 * All else is done in ring 3, in main.c, because a KVM that runs guests without hardware
 * virtualisation (PVM) emulates each instruction of ring 0, and runs those of ring 3 as they are.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "memory.h"

#define CODE32 0x08
#define CODE64 0x10
#define DATA 0x18
#define USER_DATA 0x2b
#define USER_CODE 0x33

#define CR0_PE 0x1
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define EFER 0xc0000080
#define EFER_LME 0x100
#define RFLAGS 0x3002 /* IOPL 3, the bit that is always set, and no interrupts */

    /* Present, writable, for ring 3; a large page; and accessed and dirty from the start, so that
     * no processor ever writes to a page table. */
#define TABLE_ENTRY 0x67
#define LARGE_PAGE 0xe7

    .section .rom, "ax"
    .code16
    /* At 0xf0000: where the startup interrupt with the vector 0xf0 sends the other processors. */
    movl $other32, %ebp
    jmp enter_protected_mode
boot16:
    movl $boot32, %ebp
enter_protected_mode:
    cli
    lgdtl %cs:gdt_pointer - ROM_ADDRESS
    movl %cr0, %eax
    orl $CR0_PE, %eax
    movl %eax, %cr0
    ljmpl $CODE32, $start32

    .code32
start32:
    movw $DATA, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    jmp *%ebp

boot32:
    cld
    movl $image_in_rom, %esi
    movl $image_start, %edi
    movl $image_words, %ecx
    rep movsl
other32:
    movl $CR4_PAE, %eax
    movl %eax, %cr4
    movl $level4, %eax
    movl %eax, %cr3
    movl $EFER, %ecx
    movl $EFER_LME, %eax
    xorl %edx, %edx
    wrmsr
    movl %cr0, %eax
    orl $CR0_PG, %eax
    movl %eax, %cr0
    ljmp $CODE64, $start64

    .code64
start64:
    /* Which processor this is: 0 in the image, and set by main.c before it starts another. */
    movl starting, %edi
    movl %edi, %eax
    shll $STACK_SHIFT, %eax
    leal STACKS_ADDRESS + (1 << STACK_SHIFT)(%rax), %eax
    movl %eax, %esp
    pushq $USER_DATA
    pushq %rax
    pushq $RFLAGS
    pushq $USER_CODE
    pushq $enter
    iretq

    .balign 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff /* CODE32 */
    .quad 0x00af9b000000ffff /* CODE64 */
    .quad 0x00cf93000000ffff /* DATA */
    .quad 0
    .quad 0x00cff3000000ffff /* USER_DATA */
    .quad 0x00affb000000ffff /* USER_CODE */
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

    .section .reset, "ax"
    .code16
    ljmp $ROM_ADDRESS >> 4, $boot16 - ROM_ADDRESS

    /* The rest is copied to RAM. */
    .section .text.enter, "ax"
    .code64
    .globl enter
enter:
    /* As if the function had been called, which decides how the stack is aligned. */
    pushq $0
    jmp vcpu_main

    .section .data
    .globl starting
starting:
    .quad 0

    /* The first GiB is mapped to itself by large pages; main.c maps the rest. */
    .balign 4096
    .globl level4
level4:
    .quad level3 + TABLE_ENTRY
    .fill 511, 8, 0
    .globl level3
level3:
    .quad level2 + TABLE_ENTRY
    .fill 511, 8, 0
level2:
    .set address, 0
    .rept 512
    .quad address + LARGE_PAGE
    .set address, address + 0x200000
    .endr

    .section .note.GNU-stack, "", @progbits
