/*
 * An emulated hypervisor for Debian's xenstored, preloaded into it by the tests: every domain
 * exists, a domain's shared page is a file in $FAKE_XEN, and events from domains arrive as ports
 * (4 bytes each) through the FIFO $FAKE_XEN/events. Port N belongs to domain N.
 *
 * Uses the declarations of libxen-dev. xenstored 4.17 cannot run without a hypervisor: with the
 * option not to set up dom0 (-D) it crashes on its first request, because it has no table of domains.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <xenctrl.h>
#include <xenevtchn.h>
#include <xengnttab.h>

static char handle[16];
static int events = -1;

static void in_dir(char *out, size_t size, const char *name)
{
    snprintf(out, size, "%s/%s", getenv("FAKE_XEN"), name);
}

static int shared_page(unsigned int domid)
{
    char name[32], path[512];

    snprintf(name, sizeof(name), "page-%u", domid);
    in_dir(path, sizeof(path), name);
    int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd >= 0 && ftruncate(fd, 4096) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* In dom0, Linux provides xenstored with its page and port through these two files. */
int open(const char *path, int flags, ...)
{
    va_list args;
    va_start(args, flags);
    mode_t mode = (flags & O_CREAT) ? va_arg(args, mode_t) : 0;
    va_end(args);

    if (strcmp(path, "/proc/xen/xsd_kva") == 0)
        return shared_page(0);
    if (strcmp(path, "/proc/xen/xsd_port") == 0) {
        int fd = memfd_create("port", 0);
        if (write(fd, "32752", 5) != 5 || lseek(fd, 0, SEEK_SET) != 0)
            return -1;
        return fd;
    }
    return syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

xc_interface *xc_interface_open(xentoollog_logger *l, xentoollog_logger *d, unsigned flags)
{
    return (xc_interface *)handle;
}

int xc_interface_close(xc_interface *xch) { return 0; }

int xc_domain_getinfo(xc_interface *xch, uint32_t first, unsigned int max, xc_dominfo_t *info)
{
    memset(info, 0, sizeof(*info));
    info->domid = first;
    return 1;
}

xenevtchn_handle *xenevtchn_open(xentoollog_logger *l, unsigned int flags)
{
    char path[512];

    in_dir(path, sizeof(path), "events");
    /* Opened for writing, too, so that a read never returns the end of the pipe. */
    events = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0);
    return events < 0 ? NULL : (xenevtchn_handle *)handle;
}

int xenevtchn_fd(xenevtchn_handle *xce) { return events; }
int xenevtchn_notify(xenevtchn_handle *xce, evtchn_port_t port) { return 0; }
int xenevtchn_unbind(xenevtchn_handle *xce, evtchn_port_t port) { return 0; }
int xenevtchn_unmask(xenevtchn_handle *xce, evtchn_port_t port) { return 0; }
xenevtchn_port_or_error_t xenevtchn_bind_virq(xenevtchn_handle *xce, unsigned int virq) { return 32751; }

xenevtchn_port_or_error_t xenevtchn_bind_interdomain(xenevtchn_handle *xce, uint32_t domid, evtchn_port_t port)
{
    return port;
}

xenevtchn_port_or_error_t xenevtchn_pending(xenevtchn_handle *xce)
{
    evtchn_port_t port;

    return read(events, &port, sizeof(port)) == sizeof(port) ? (int)port : -1;
}

xengnttab_handle *xengnttab_open(xentoollog_logger *l, unsigned flags) { return (xengnttab_handle *)handle; }
int xengnttab_close(xengnttab_handle *xgt) { return 0; }
int xengnttab_set_max_grants(xengnttab_handle *xgt, uint32_t count) { return 0; }
int xengnttab_unmap(xengnttab_handle *xgt, void *at, uint32_t count) { return munmap(at, 4096); }

void *xengnttab_map_grant_ref(xengnttab_handle *xgt, uint32_t domid, uint32_t ref, int prot)
{
    int fd = shared_page(domid);
    void *page = mmap(NULL, 4096, prot, MAP_SHARED, fd, 0);

    close(fd);
    return page == MAP_FAILED ? NULL : page;
}
