//! Compares the numbers and sizes of this crate with those that a C compiler computes from the
//! public headers.

use super::{copy, evtchn, gntalloc, gntdev};
use std::io::Write;
use std::process::{Command, Stdio};

const PROGRAM: &str = r#"
#include <stdio.h>
#include <stdint.h>
#include <stddef.h>
#include <sys/ioctl.h>
#include <xen/xen.h>
#include <xen/grant_table.h>
#include <xen/gntdev.h>
#include <xen/evtchn.h>
#undef UNMAP_NOTIFY_CLEAR_BYTE
#undef UNMAP_NOTIFY_SEND_EVENT
#include <xen/gntalloc.h>
#define SHOW(x) printf(#x " %lu\n", (unsigned long)(x))
#define AT(t, f) printf(#t "." #f " %lu\n", (unsigned long)offsetof(struct t, f))
int main(void) {
    SHOW(IOCTL_GNTDEV_MAP_GRANT_REF); SHOW(IOCTL_GNTDEV_UNMAP_GRANT_REF);
    SHOW(IOCTL_GNTDEV_SET_UNMAP_NOTIFY); SHOW(IOCTL_GNTDEV_GRANT_COPY);
    SHOW(IOCTL_GNTALLOC_ALLOC_GREF); SHOW(IOCTL_GNTALLOC_DEALLOC_GREF);
    SHOW(IOCTL_EVTCHN_BIND_INTERDOMAIN); SHOW(IOCTL_EVTCHN_BIND_UNBOUND_PORT);
    SHOW(IOCTL_EVTCHN_UNBIND); SHOW(IOCTL_EVTCHN_NOTIFY);
    SHOW(IOCTL_EVTCHN_RESET); SHOW(IOCTL_EVTCHN_RESTRICT_DOMID);
    SHOW(GNTCOPY_source_gref); SHOW(GNTCOPY_dest_gref);
    SHOW(UNMAP_NOTIFY_CLEAR_BYTE); SHOW(UNMAP_NOTIFY_SEND_EVENT); SHOW(GNTALLOC_FLAG_WRITABLE);
    SHOW(sizeof(struct gntdev_grant_copy_segment));
    AT(gntdev_grant_copy_segment, dest); AT(gntdev_grant_copy_segment, len);
    AT(gntdev_grant_copy_segment, flags); AT(gntdev_grant_copy_segment, status);
    AT(gntdev_grant_copy_segment, source.foreign.offset);
    AT(gntdev_grant_copy_segment, source.foreign.domid);
    AT(ioctl_gntdev_map_grant_ref, index); AT(ioctl_gntdev_map_grant_ref, refs);
    AT(ioctl_gntdev_unmap_notify, event_channel_port);
    AT(ioctl_gntalloc_alloc_gref, flags); AT(ioctl_gntalloc_alloc_gref, index);
    AT(ioctl_gntalloc_alloc_gref, gref_ids); AT(ioctl_gntalloc_dealloc_gref, count);
    return 0;
}
"#;

fn expected() -> Vec<(&'static str, u64)> {
    vec![
        ("IOCTL_GNTDEV_MAP_GRANT_REF", gntdev::MAP_GRANT_REF.into()),
        ("IOCTL_GNTDEV_UNMAP_GRANT_REF", gntdev::UNMAP_GRANT_REF.into()),
        ("IOCTL_GNTDEV_SET_UNMAP_NOTIFY", gntdev::SET_UNMAP_NOTIFY.into()),
        ("IOCTL_GNTDEV_GRANT_COPY", copy::GRANT_COPY.into()),
        ("IOCTL_GNTALLOC_ALLOC_GREF", gntalloc::ALLOC_GREF.into()),
        ("IOCTL_GNTALLOC_DEALLOC_GREF", gntalloc::DEALLOC_GREF.into()),
        ("IOCTL_EVTCHN_BIND_INTERDOMAIN", evtchn::BIND_INTERDOMAIN.into()),
        ("IOCTL_EVTCHN_BIND_UNBOUND_PORT", evtchn::BIND_UNBOUND_PORT.into()),
        ("IOCTL_EVTCHN_UNBIND", evtchn::UNBIND.into()),
        ("IOCTL_EVTCHN_NOTIFY", evtchn::NOTIFY.into()),
        ("IOCTL_EVTCHN_RESET", evtchn::RESET.into()),
        ("IOCTL_EVTCHN_RESTRICT_DOMID", evtchn::RESTRICT_DOMID.into()),
        ("GNTCOPY_source_gref", 1),
        ("GNTCOPY_dest_gref", 2),
        ("UNMAP_NOTIFY_CLEAR_BYTE", 1),
        ("UNMAP_NOTIFY_SEND_EVENT", 2),
        ("GNTALLOC_FLAG_WRITABLE", 1),
        ("sizeof(struct gntdev_grant_copy_segment)", 24),
        ("gntdev_grant_copy_segment.dest", 8),
        ("gntdev_grant_copy_segment.len", 16),
        ("gntdev_grant_copy_segment.flags", 18),
        ("gntdev_grant_copy_segment.status", 20),
        ("gntdev_grant_copy_segment.source.foreign.offset", 4),
        ("gntdev_grant_copy_segment.source.foreign.domid", 6),
        ("ioctl_gntdev_map_grant_ref.index", 8),
        ("ioctl_gntdev_map_grant_ref.refs", 16),
        ("ioctl_gntdev_unmap_notify.event_channel_port", 12),
        ("ioctl_gntalloc_alloc_gref.flags", 2),
        ("ioctl_gntalloc_alloc_gref.index", 8),
        ("ioctl_gntalloc_alloc_gref.gref_ids", 16),
        ("ioctl_gntalloc_dealloc_gref.count", 8),
    ]
}

#[test]
fn ioctl_numbers_and_layouts_match_xen_headers() {
    if !std::path::Path::new("/usr/include/xen/gntdev.h").exists() {
        println!("SKIPPED: no Xen headers here; apt-get install libxen-dev");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let exe = dir.path().join("show");
    let cc =
        Command::new("cc").args(["-x", "c", "-", "-o"]).arg(&exe).stdin(Stdio::piped()).spawn();
    let Ok(mut cc) = cc else {
        println!("SKIPPED: no C compiler here; apt-get install gcc libc6-dev");
        return;
    };
    cc.stdin.take().unwrap().write_all(PROGRAM.as_bytes()).unwrap();
    assert!(cc.wait().unwrap().success(), "the headers do not compile");
    let shown = String::from_utf8(Command::new(&exe).output().unwrap().stdout).unwrap();
    let ours: String = expected().iter().map(|(name, value)| format!("{name} {value}\n")).collect();
    assert_eq!(shown, ours);
}

#[test]
fn filter_of_a_device_process_has_the_requests_of_a_session() {
    use pvio_confinement::calls::ioctls::{DISK, NIC};
    let requests = [
        gntdev::MAP_GRANT_REF,
        gntdev::UNMAP_GRANT_REF,
        copy::GRANT_COPY,
        evtchn::UNBIND,
        evtchn::NOTIFY,
        // A channel that is closed.
        evtchn::RESET,
    ];
    for request in requests {
        assert!(DISK.contains(&request) && NIC.contains(&request), "{request:#x}");
    }
    // After the start, no port is bound, whatever domain it belongs to.
    for request in [evtchn::BIND_INTERDOMAIN, evtchn::BIND_UNBOUND_PORT, gntalloc::ALLOC_GREF] {
        assert!(!DISK.contains(&request) && !NIC.contains(&request), "{request:#x}");
    }
}
