//! Messages between the supervisor and a process that was taken over: a device process or an image helper
//! sends anything, with any descriptors. The same for what a process receives.
//!
//! What is accepted is bounded and possible, and no descriptor is left open.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_blkback::engine::Geometry;
use pvio_blkback::session::SessionIdentity;
use pvio_confinement::Applied;
use pvio_daemon::process::channel::{Channel, ChannelError};
use pvio_daemon::process::disk::{DiskChange, DiskIdentity, DiskServe};
use pvio_daemon::process::faults::reported;
use pvio_daemon::process::helper::fuzz::answer;
use pvio_daemon::process::messages::{FromDevice, ToDevice, VERSION, is_understood};
use pvio_daemon::process::nic::{NicChange, NicIdentity, NicServe};
use pvio_daemon::process::status::{ProcessStatus, ServedBy};
use pvio_grant_table::DomId;
use pvio_recordfile::CounterFile;
use pvio_ring::proto::blkif::Abi;
use pvio_storage::image::{Disk, DiskDescription, HandedRecord, Resolved};
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::common::{BackendKind, DeviceAddr};
use pvio_xenbus::handshake::vbd::Queue;
use rustix::net::SendFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

#[derive(Arbitrary, Debug)]
struct Input {
    receiver: Receiver,
    messages: Vec<Message>,
}

#[derive(Arbitrary, Debug)]
enum Receiver {
    SupervisorOfDisk,
    SupervisorOfNic,
    SupervisorOfHelper,
    Disk,
    Nic,
}

#[derive(Arbitrary, Debug)]
struct Message {
    content: Content,
    descriptors: Vec<Descriptor>,
}

#[derive(Arbitrary, Debug)]
enum Content {
    /// A valid message with changes.
    Edited(u8, Vec<(u16, Edit)>),
    Bytes(Vec<u8>),
}

/// A change of one of the values that a message consists of.
#[derive(Arbitrary, Debug)]
enum Edit {
    Null,
    Flag(bool),
    Number(u64),
    Negative(i64),
    Text(String),
    Long(u16),
    Nested(u8),
    Empty,
    Twice,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Descriptor {
    Pipe,
    Memory,
    Counters,
    /// The socket on which it is sent.
    Same,
}

fuzz_target!(|input: Input| {
    let before = lowest_free();
    {
        let (theirs, ours) = Channel::pair().expect("descriptors");
        let disk: Disk = "qcow2:/images/disk.qcow2".parse().expect("a valid disk");
        let templates = match input.receiver {
            Receiver::SupervisorOfHelper => answers(),
            Receiver::Disk | Receiver::Nic => to_device(&disk),
            Receiver::SupervisorOfDisk | Receiver::SupervisorOfNic => from_device(&disk),
        };
        for message in input.messages.into_iter().take(16) {
            send(&theirs, &templates, message);
        }
        drop(theirs);
        match input.receiver {
            Receiver::SupervisorOfDisk => supervise::<DiskIdentity>(&ours, |identity| {
                assert!(identity.session == identity.session.clone());
            }),
            Receiver::SupervisorOfNic => supervise::<NicIdentity>(&ours, |identity| {
                assert!(identity.serves(&identity.spec));
                let _ = identity.link.descriptors();
            }),
            Receiver::SupervisorOfHelper => {
                if let Ok(answer) = answer(&ours, &disk) {
                    match answer {
                        Ok(resolved) => check_disk(&resolved),
                        Err(failure) => check_fault(&failure.fault),
                    }
                }
            }
            Receiver::Disk => each::<ToDevice<DiskServe<()>, DiskChange>>(&ours, |_, _| {}),
            Receiver::Nic => each::<ToDevice<NicServe<()>, NicChange>>(&ours, |_, _| {}),
        }
    }
    assert_eq!(lowest_free(), before, "a descriptor is left open");
});

/// Returns the number of the next descriptor.
fn lowest_free() -> i32 {
    rustix::io::dup(std::io::stderr()).expect("a descriptor").as_raw_fd()
}

fn value(message: impl Serialize) -> Value {
    serde_json::to_value(message).expect("a message")
}

fn identity(disk: &Disk) -> DiskIdentity {
    let addr = DeviceAddr { kind: BackendKind::Vbd, back: DomId(1), front: DomId(2), index: 51712 };
    let queues = vec![Queue { ring_refs: vec![8, 9], event_channel: 3 }];
    let session = SessionIdentity { addr, abi: Abi::X86_64, persistent: true, queues };
    let image = DiskDescription { geometry: Geometry::new(2048), files: Vec::new(), export: None };
    DiskIdentity { session, disk: disk.clone(), image }
}

fn from_device(disk: &Disk) -> Vec<Value> {
    type From = FromDevice<DiskIdentity>;
    let hello = |session| From::Hello { version: VERSION, session };
    vec![
        value(hello(Some(Box::new(identity(disk))))),
        value(hello(None)),
        value(From::Confined(Applied::default())),
        value(From::Ready),
        value(From::Fault(Fault::new("ring-overflow", "the ring is full").with_remedy("none"))),
        value(From::FlushFailed),
        value(From::Redial),
    ]
}

fn to_device(disk: &Disk) -> Vec<Value> {
    type To = ToDevice<DiskIdentity, DiskChange>;
    vec![
        value(To::Stop),
        value(To::Change(DiskChange::Resize(8))),
        value(To::Change(DiskChange::Abandoned)),
        value(To::Change(DiskChange::Connection(Some("refused".into())))),
        value(To::Change(DiskChange::Options(Box::new(disk.options.clone())))),
        value(ToDevice::<(), NicChange>::Change(NicChange::Headroom(256))),
        value(ToDevice::<(), NicChange>::Change(NicChange::Rate(None))),
        value(To::Serve(Box::new(identity(disk)))),
        json!({ "Descriptors": ["Platform", "Record", "Fence", "Counters", "Link"] }),
    ]
}

fn answers() -> Vec<Value> {
    let file = json!({ "File": {
        "path": "/images/base", "write": false, "direct": false, "locked": true, "device": null
    }});
    let resolved =
        DiskDescription { geometry: Geometry::new(2048), files: Vec::new(), export: None };
    let fault = Fault::new("image", "it is damaged");
    vec![
        json!({ "Files": [file] }),
        json!({ "Files": [file, file] }),
        json!({ "Files": [value(HandedRecord::Scratch)] }),
        json!({ "Done": { "Resolved": value(resolved) } }),
        json!({ "Done": { "Failed": { "fault": value(fault), "busy": false } } }),
    ]
}

fn send(channel: &Channel, templates: &[Value], Message { content, descriptors }: Message) {
    // One more than a message may have.
    let descriptors: Vec<OwnedFd> =
        descriptors.into_iter().take(65).map(|kind| descriptor(channel, kind)).collect();
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    match content {
        Content::Edited(which, edits) => {
            let mut message = templates[usize::from(which) % templates.len()].clone();
            for (at, edit) in edits.into_iter().take(16) {
                let mut left = at % 64;
                if let Some(place) = nth(&mut message, &mut left) {
                    apply(place, edit);
                }
            }
            let _ = channel.send(&message, &borrowed);
        }
        Content::Bytes(bytes) => {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let _ = rustix::net::send(channel, &bytes, flags);
        }
    }
}

fn descriptor(channel: &Channel, kind: Descriptor) -> OwnedFd {
    match kind {
        Descriptor::Pipe => rustix::pipe::pipe().expect("a pipe").0,
        Descriptor::Memory => {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            rustix::fs::memfd_create("other", flags).expect("memory")
        }
        Descriptor::Counters => CounterFile::create(2).expect("memory").0,
        Descriptor::Same => rustix::io::fcntl_dupfd_cloexec(channel, 0).expect("a descriptor"),
    }
}

/// Returns a value of a message, counted from the root.
fn nth<'a>(value: &'a mut Value, left: &mut u16) -> Option<&'a mut Value> {
    if *left == 0 {
        return Some(value);
    }
    *left -= 1;
    match value {
        Value::Array(all) => all.iter_mut().find_map(|value| nth(value, left)),
        Value::Object(all) => all.values_mut().find_map(|value| nth(value, left)),
        _ => None,
    }
}

fn apply(place: &mut Value, edit: Edit) {
    *place = match edit {
        Edit::Null => Value::Null,
        Edit::Flag(flag) => flag.into(),
        Edit::Number(number) => number.into(),
        Edit::Negative(number) => number.into(),
        Edit::Text(text) => text.into(),
        Edit::Long(len) => "\u{1b}".repeat(len.into()).into(),
        Edit::Nested(depth) => (0..depth).fold(json!([]), |inner, _| json!([inner])),
        Edit::Empty => json!({}),
        Edit::Twice => json!([place.clone(), place.clone()]),
    };
}

/// Receives all messages.
fn each<T: DeserializeOwned>(channel: &Channel, mut on: impl FnMut(T, Vec<OwnedFd>)) {
    loop {
        match channel.receive_from::<T>() {
            Ok(Some(received)) => on(received.message, received.descriptors),
            Ok(None) | Err(ChannelError::Closed) => return,
            Err(_) => {}
        }
    }
}

/// Receives messages as a supervisor does.
fn supervise<I: DeserializeOwned>(channel: &Channel, check: impl Fn(&I)) {
    let mut status = ProcessStatus::default();
    each(channel, |message: FromDevice<I>, descriptors| match message {
        FromDevice::Hello { version, session } => {
            if let Some(session) = session.filter(|_| is_understood(version)) {
                check(&session);
            }
            if let Some(file) = descriptors.into_iter().next()
                && let Ok((_, counters)) = CounterFile::read(file)
            {
                assert!((0..counters.queues()).all(|queue| counters.words(queue).count() > 0));
            }
        }
        FromDevice::Confined(applied) => status.set_applied("vbd-2-51712", applied),
        FromDevice::Fault(fault) => check_fault(&reported(fault)),
        FromDevice::Ready
        | FromDevice::FlushFailed
        | FromDevice::Paused(_)
        | FromDevice::Redial => {}
    });
    let _ = ServedBy::Process(status).confinement().to_string();
}

/// Asserts that a fault can go to the log and to xenstore.
fn check_fault(fault: &Fault) {
    let texts = fault.remedy.iter().map(|remedy| &**remedy).chain([&*fault.text]);
    for text in texts {
        assert!(text.chars().count() <= 1024 && !text.contains(|c: char| c.is_control()));
    }
    assert!(!fault.code.is_empty() && fault.code.len() <= 48 && fault.code.is_ascii());
}

/// Asserts that a disk may be as a helper has described it.
fn check_disk(Resolved { geometry, files }: &Resolved) {
    assert!(matches!(geometry.sector_size, 512 | 4096) && geometry.sectors > 0);
    let records = files.records();
    assert_eq!(records.len(), files.descriptors().count());
    assert!(records.len() <= Resolved::MAX_FILES);
    for record in records {
        match record {
            HandedRecord::File(file) => assert!(file.path.is_absolute()),
            HandedRecord::Server(_) => {}
            HandedRecord::Scratch | HandedRecord::Connection => {
                panic!("not a helper's: {record:?}")
            }
        }
    }
}
