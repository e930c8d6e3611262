//! What a loss of power leaves, told by a real file system: the kernel's ext4 works on a guest's disk,
//! through a loop device over a file (by FUSE) whose bytes are read, written and flushed through
//! frontend, ring and backend. The engine records what reaches it; then power is lost at every flush
//! and in between, with what no flush covers lost, torn or in another order. Each such disk is mounted
//! by the kernel, must have everything that was synced until then, and is checked by e2fsck.
#![cfg(feature = "std")]

mod support;

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyWrite, Request, WriteFlags,
};
use pvio_blkback::Serve;
use pvio_blkback::engine::Geometry;
use pvio_blkback::engine::record::{Loss, Record};
use pvio_blkback::image::{Image, ImageOptions};
use pvio_blkback::queue::{QueueFault, QueueParts};
use pvio_blkback::worker::Worker;
use pvio_blkfront::SLOT_BYTES;
use pvio_event_channel::EventChannels;
use pvio_hosted::Domain;
use pvio_ring::proto::blkif::Status;
use pvio_xenbus::driver::Fault;
use pvio_xenbus::handshake::vbd::{Backing, Mode, ToolstackBack};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};
use support::{Deed, Guest, Machine, Rng, has, text, tool};

const SIZE: u64 = 16 << 20;

/// Serves raw images whose changes are recorded.
struct Recording {
    record: Arc<Record>,
    image: Option<Arc<Image>>,
}

impl Serve<Domain> for Recording {
    type Running = Worker;

    fn open(&mut self, disk: &ToolstackBack) -> Result<Geometry, Fault> {
        let Backing::Format("raw", path) = disk.backing() else { panic!("{disk:?}") };
        let image = Image::open(path.as_ref(), ImageOptions::default());
        let image = image.map_err(|e| Fault::new(e.code(), e))?.recorded(self.record.clone());
        let geometry = image.geometry();
        self.image = Some(Arc::new(image));
        Ok(geometry)
    }

    fn start(
        &mut self,
        name: &str,
        parts: QueueParts<Domain, <Domain as EventChannels>::Channel>,
    ) -> Result<Worker, Fault> {
        let image = self.image.clone().unwrap();
        Ok(Worker::start(name, parts, image, || ()).unwrap())
    }

    fn fault(&mut self, running: &mut Worker) -> Option<QueueFault> {
        running.fault()
    }
}

/// A file system with one file: the guest's disk.
struct DiskFile(Mutex<Guest>);

const DISK: INodeNo = INodeNo(2);
const LONG: Duration = Duration::from_secs(3600);

fn attr(ino: INodeNo) -> FileAttr {
    let file = ino == DISK;
    FileAttr {
        ino,
        size: if file { SIZE } else { 0 },
        blocks: SIZE / 512,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: if file { FileType::RegularFile } else { FileType::Directory },
        perm: 0o700,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

impl DiskFile {
    /// Does a range in pieces that the ring takes, all at once.
    fn all(&self, offset: u64, len: usize, deed: impl Fn(u64, usize, usize) -> Deed) -> Vec<u8> {
        assert!(offset.is_multiple_of(512) && len.is_multiple_of(512), "{offset}+{len}");
        let deeds: Vec<Deed> = (0..len)
            .step_by(SLOT_BYTES)
            .map(|at| deed((offset + at as u64) / 512, at, (len - at).min(SLOT_BYTES)))
            .collect();
        let found = self.0.lock().unwrap().all(&deeds);
        assert!(found.iter().all(|(status, _)| *status == Status::Okay));
        found.into_iter().flat_map(|(_, data)| data).collect()
    }
}

impl Filesystem for DiskFile {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("disk") => reply.entry(&LONG, &attr(DISK), Generation(0)),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&LONG, &attr(ino));
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = u64::from(size).min(SIZE.saturating_sub(offset)) as usize;
        reply.data(&self.all(offset, len, |sector, _, len| Deed::Read(sector, len / 512)));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let deed = |sector, at: usize, len| Deed::Write(sector, data[at..at + len].to_vec());
        self.all(offset, data.len(), deed);
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.0.lock().unwrap().one(Deed::Flush);
        reply.ok();
    }

    fn destroy(&mut self) {}
}

/// A mounted file system; unmounted when it is dropped.
///
/// Each is to be of a file of its own. Whoever begins a mount namespace meanwhile has the mount too,
/// and keeps it and its loop device when it is gone here: `mount` would take that loop device again
/// for the same file, and the kernel would show the file system as it was, whatever the file has now.
struct Mounted(PathBuf);

impl Mounted {
    fn new(image: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        // Sizes of the device as of the file, whatever there was at its number before.
        tool("mount", &["-t", "ext4", "-o", "loop,noatime", text(image), text(at)]);
        Self(at.to_path_buf())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        tool("umount", &[text(&self.0)]);
    }
}

/// Another program, that has what is mounted when it begins for as long as it runs.
struct Held(Child);

impl Held {
    fn new() -> Self {
        let mut unshare = Command::new("unshare");
        let unshare = unshare.args(["--mount", "sh", "-c", "echo; exec cat"]);
        let mut child = unshare.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // It has it by now.
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Self(child)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Something that was synced, and from when until when it was to be there.
struct Fact {
    from: usize,
    until: usize,
    name: String,
    content: Vec<u8>,
}

/// Works on a file system; gives what was promised at which moment.
fn work(dir: &Path, record: &Record) -> Vec<Fact> {
    let mut rng = Rng(1);
    let mut facts: Vec<Fact> = Vec::new();
    let sync = |path: &Path| File::open(path).unwrap().sync_all().unwrap();
    fs::create_dir(dir.join("d")).unwrap();
    for i in 0..24 {
        // Something nobody waits for.
        fs::write(dir.join(format!("loose{}", i % 5)), noise(&mut rng, 30_000)).unwrap();
        let content = noise(&mut rng, 60_000);
        let name = format!("d/file{i}");
        let mut file = File::create(dir.join(&name)).unwrap();
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
        sync(&dir.join("d"));
        facts.push(Fact { from: record.now(), until: usize::MAX, name, content });
        let before = record.now();
        let other = rng.below(facts.len() as u64) as usize;
        let Some(fact) = facts.get_mut(other).filter(|fact| fact.until == usize::MAX) else {
            continue;
        };
        fact.until = before;
        let (name, content) = (fact.name.clone(), fact.content.clone());
        match i % 3 {
            0 => {
                let to = format!("{name}.moved");
                fs::rename(dir.join(&name), dir.join(&to)).unwrap();
                sync(&dir.join("d"));
                facts.push(Fact { from: record.now(), until: usize::MAX, name: to, content });
            }
            1 => fs::remove_file(dir.join(&name)).unwrap(),
            _ => {
                let mut file = File::options().append(true).open(dir.join(&name)).unwrap();
                file.write_all(b"more").unwrap();
                file.sync_data().unwrap();
                let content = [&content[..], b"more"].concat();
                facts.push(Fact { from: record.now(), until: usize::MAX, name, content });
            }
        }
    }
    facts
}

fn noise(rng: &mut Rng, most: u64) -> Vec<u8> {
    (0..rng.below(most)).map(|_| rng.next() as u8).collect()
}

/// Whether this machine lets us mount; says loudly when it does not.
fn can_mount() -> bool {
    let missing = [("/dev/fuse", "the fuse module"), ("/dev/loop-control", "the loop module")];
    if let Some((_, what)) = missing.iter().find(|(path, _)| !Path::new(path).exists()) {
        eprintln!("SKIPPED: this kernel has not {what}; load it");
        return false;
    }
    let id = Command::new("id").arg("-u").output().map(|o| o.stdout).unwrap_or_default();
    if id != b"0\n" {
        eprintln!("SKIPPED: mounting takes root; run this test as root");
        return false;
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.contains("\text4\n") {
        eprintln!("SKIPPED: this kernel has no ext4; load the module");
        return false;
    }
    has("mke2fs", "e2fsprogs")
        && has("e2fsck", "e2fsprogs")
        && has("fusermount3", "fuse3")
        && has("unshare", "util-linux")
}

#[test]
fn what_was_synced_outlives_a_loss_of_power_at_any_moment() {
    if !can_mount() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let image = path("disk.img");
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    let options =
        ["-q", "-F", "-t", "ext4", "-b", "1024", "-J", "size=1", "-E", "lazy_itable_init=0"];
    tool("mke2fs", &[&options[..], &[text(&image)]].concat());
    let begin = fs::read(&image).unwrap();

    let record = Arc::new(Record::default());
    let server = Recording { record: record.clone(), image: None };
    let params = format!("raw:{}", text(&image));
    let guest = Machine::new().disk_of(&params, Mode::ReadWrite, server);
    fs::create_dir(path("fuse")).unwrap();
    let file = DiskFile(Mutex::new(guest));
    let session = fuser::spawn_mount(file, path("fuse"), &fuser::Config::default()).unwrap();
    let facts = {
        let mounted = Mounted::new(&path("fuse").join("disk"), &path("mnt"));
        work(&mounted.0, &record)
    };
    session.umount_and_join().unwrap();

    let flushes = record.flushes();
    let last = record.now();
    assert!(flushes.len() > 40 && facts.len() > 24, "{} flushes", flushes.len());
    // At each flush, and at moments in between.
    let mut rng = Rng(3);
    let mut worlds: Vec<(usize, Loss)> =
        flushes.iter().map(|moment| (*moment, Loss::All)).collect();
    worlds.extend((0..150).map(|_| (rng.below(last as u64) as usize, Loss::Some(rng.next()))));
    worlds.extend((0..20).map(|_| (rng.below(last as u64) as usize, Loss::Nothing)));
    let (mut checked, mut replayed) = (0, 0);
    let mut held = None;
    for (i, (moment, loss)) in worlds.iter().enumerate() {
        let mut disk = begin.clone();
        record.after_power_loss(&mut disk, *moment, *loss);
        let after = path(&format!("after{i}.img"));
        fs::write(&after, &disk).unwrap();
        replayed += usize::from(needs_recovery(&disk));
        {
            let mounted = Mounted::new(&after, &path("after"));
            // As other programs of this machine do at any time.
            held.get_or_insert_with(Held::new);
            for fact in facts.iter().filter(|f| (f.from..=f.until).contains(moment)) {
                let found = fs::read(mounted.0.join(&fact.name));
                let found =
                    found.unwrap_or_else(|e| panic!("{}: {e}; {moment} {loss:?}", fact.name));
                assert!(found == fact.content, "{} is another; {moment} {loss:?}", fact.name);
                checked += 1;
            }
        }
        let check = Command::new("e2fsck").args(["-fn", text(&after)]).output().unwrap();
        let told = String::from_utf8_lossy(&check.stdout);
        assert!(check.status.success(), "{moment} {loss:?}: {told}");
        fs::remove_file(&after).unwrap();
    }
    eprintln!(
        "{last} events, {} flushes; {} losses of power, {replayed} with a journal to replay; \
         {checked} files were as they were synced",
        flushes.len(),
        worlds.len()
    );
    assert!(replayed > worlds.len() / 2 && checked > worlds.len());

    // And it was for the flushes: a moment before the last of them is over, what is synced by it
    // may still be lost. A disk whose flushes are answered too early would be found out by that.
    let mut lost = 0;
    for (i, fact) in facts.iter().take(8).enumerate() {
        let flush = flushes.iter().rev().find(|moment| **moment <= fact.from).unwrap();
        let mut disk = begin.clone();
        record.after_power_loss(&mut disk, flush - 1, Loss::All);
        let after = path(&format!("before{i}.img"));
        fs::write(&after, &disk).unwrap();
        let mounted = Mounted::new(&after, &path("after"));
        let found = fs::read(mounted.0.join(&fact.name));
        lost += usize::from(found.map_or(true, |found| found != fact.content));
    }
    assert_eq!(lost, 8);
}

/// `EXT4_FEATURE_INCOMPAT_RECOVER` of the superblock.
fn needs_recovery(disk: &[u8]) -> bool {
    disk[1024 + 0x60] & 4 != 0
}
