/*
 * layout: one ROM of 64 KiB.  The code that starts a processor runs in it; the image is in it and
 * runs where it is copied to.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "memory.h"

OUTPUT_FORMAT("elf64-x86-64")
ENTRY(enter)

SECTIONS
{
    .rom ROM_ADDRESS : { *(.rom) . = ALIGN(16); }
    image_in_rom = LOADADDR(.rom) + SIZEOF(.rom);

    .image IMAGE_ADDRESS : AT(image_in_rom)
    {
        image_start = .;
        *(.text .text.*)
        *(.rodata .rodata.*)
        *(.data .data.*)
        . = ALIGN(16);
    }
    image_words = SIZEOF(.image) / 4;
    ASSERT(image_in_rom + SIZEOF(.image) <= PARAMETERS_ADDRESS, "the image does not fit into the ROM")

    .bss (NOLOAD) : ALIGN(16)
    {
        bss_start = .;
        *(.bss .bss.* COMMON)
        . = ALIGN(16);
        bss_end = .;
    }
    ASSERT(bss_end <= PROGRESS_ADDRESS, "the image is too large")

    .reset RESET_ADDRESS : AT(RESET_ADDRESS)
    {
        *(.reset)
        . = 16;
    }
    /DISCARD/ : { *(.comment) *(.note*) *(.eh_frame*) }
}
