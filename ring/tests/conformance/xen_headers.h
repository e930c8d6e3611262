/* Xen's public headers for a user-space program, after the barriers that they need. With -DX86_32,
 * 64-bit fields are aligned to 4 bytes, which is the only difference of the i386 ABI here; Linux's
 * blkback uses the same pragma for the same structs. */
#ifndef PVIO_XEN_HEADERS_H
#define PVIO_XEN_HEADERS_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define __XEN_INTERFACE_VERSION__ 0x00040d00
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)

#define XEN_NETIF_DEFINE_TOEPLITZ

#ifdef X86_32
#pragma pack(push, 4)
#endif
#include <xen/grant_table.h>
#include <xen/io/blkif.h>
#include <xen/io/console.h>
#include <xen/io/netif.h>
#include <xen/io/ring.h>
#include <xen/io/xs_wire.h>
#ifdef X86_32
#pragma pack(pop)
#endif

#define PAGE 4096u
#endif
