//! Power loss, judged by a real file system: the kernel's ext4 works on a guest's disk, through a
//! loop device over a file whose bytes are read, written and flushed through frontend, ring and
//! backend. Then power is lost at every flush and in between, with unflushed writes lost, torn or
//! reordered. The kernel mounts each resulting disk, which must contain everything that was synced
//! until then, and e2fsck checks it.

use super::support::{Rng, has, text, tool};
use pvio_storage::engine::record::{Loss, Record};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A mounted file system; unmounted when it is dropped.
///
/// Each must have its own file. A process that creates a mount namespace in the meantime inherits
/// the mount, and holds it and its loop device after it is unmounted here: `mount` would reuse that
/// loop device for the same file, and the kernel would show the old contents of the file system,
/// whatever the file contains now.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn new(image: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        // The device takes its size from the file, whatever device had the same number before.
        tool("mount", &["-t", "ext4", "-o", "loop,noatime", text(image), text(at)]);
        Self(at.to_path_buf())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        tool("umount", &[text(&self.0)]);
    }
}

/// Another program, which holds the mounts that exist when it starts for as long as it runs.
pub struct Held(Child);

impl Held {
    pub fn new() -> Self {
        let mut unshare = Command::new("unshare");
        let unshare = unshare.args(["--mount", "sh", "-c", "echo; exec cat"]);
        let mut child = unshare.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // It has the mounts by now.
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

/// Data that was synced, and the range of points in time at which it must exist.
pub struct Fact {
    pub from: usize,
    until: usize,
    name: String,
    content: Vec<u8>,
}

/// Works on a file system. Returns the data that must exist, with points in time.
pub fn work(dir: &Path, record: &Record) -> Vec<Fact> {
    let mut rng = Rng(1);
    let mut facts: Vec<Fact> = Vec::new();
    let sync = |path: &Path| File::open(path).unwrap().sync_all().unwrap();
    fs::create_dir(dir.join("d")).unwrap();
    for i in 0..24 {
        // Data that is not synced.
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

/// Returns whether this machine permits mounting; prints a message otherwise.
pub fn can_mount() -> bool {
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

/// Creates the file system, in a file of `size` bytes.
pub fn make(image: &Path, size: u64) {
    File::create(image).unwrap().set_len(size).unwrap();
    let options =
        ["-q", "-F", "-t", "ext4", "-b", "1024", "-J", "size=1", "-E", "lazy_itable_init=0"];
    tool("mke2fs", &[&options[..], &[text(image)]].concat());
}

/// Loses power at each of `flushes` and at points in between. `left` creates the file with the disk
/// as it is after the loss.
pub fn lose_power(
    dir: &Path,
    record: &Record,
    facts: &[Fact],
    left: &mut dyn FnMut(usize, Loss, &Path),
) {
    let flushes = record.flushes();
    let last = record.now();
    assert!(flushes.len() > 40 && facts.len() > 24, "{} flushes", flushes.len());
    let mut rng = Rng(3);
    let mut worlds: Vec<(usize, Loss)> =
        flushes.iter().map(|moment| (*moment, Loss::All)).collect();
    worlds.extend((0..150).map(|_| (rng.below(last as u64) as usize, Loss::Some(rng.next()))));
    worlds.extend((0..20).map(|_| (rng.below(last as u64) as usize, Loss::Nothing)));
    let (mut checked, mut replayed) = (0, 0);
    let mut held = None;
    for (i, (moment, loss)) in worlds.iter().enumerate() {
        let after = dir.join(format!("after{i}.img"));
        left(*moment, *loss, &after);
        replayed += usize::from(needs_recovery(&after));
        {
            let mounted = Mounted::new(&after, &dir.join("after"));
            // As other programs of this machine may do at any time.
            held.get_or_insert_with(Held::new);
            for fact in facts.iter().filter(|f| (f.from..=f.until).contains(moment)) {
                let found = fs::read(mounted.0.join(&fact.name));
                let found =
                    found.unwrap_or_else(|e| panic!("{}: {e}; {moment} {loss:?}", fact.name));
                assert!(
                    found == fact.content,
                    "{} has other contents; {moment} {loss:?}",
                    fact.name
                );
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

    // Checks that the flushes matter: just before the last of them completes, data that it covers
    // may still be lost. A disk that completes flushes too early would be detected by that.
    let mut lost = 0;
    for (i, fact) in facts.iter().take(8).enumerate() {
        let flush = flushes.iter().rev().find(|moment| **moment <= fact.from).unwrap();
        let after = dir.join(format!("before{i}.img"));
        left(flush - 1, Loss::All, &after);
        let mounted = Mounted::new(&after, &dir.join("after"));
        let found = fs::read(mounted.0.join(&fact.name));
        lost += usize::from(found.map_or(true, |found| found != fact.content));
    }
    assert_eq!(lost, 8);
}

/// `EXT4_FEATURE_INCOMPAT_RECOVER` of the superblock.
fn needs_recovery(disk: &Path) -> bool {
    let mut head = [0; 2048];
    File::open(disk).unwrap().read_exact(&mut head).unwrap();
    head[1024 + 0x60] & 4 != 0
}
