//! The file systems: all data as the tools wrote it, and damaged images, which must cause errors
//! and no hangs.
#![allow(missing_docs, reason = "tests")]

mod kernel;

use crossbeam_channel::Receiver;
use pvio_demo::guest::fs::thread::{FsResponse, FsThread, Reply};
use pvio_demo::guest::fs::{BlockRead, Disk, FileDisk, FsError, Handle, Kind, MemDisk, Target};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

struct Fs {
    thread: FsThread,
    responses: Receiver<FsResponse>,
    token: u64,
}

impl Fs {
    fn of(disk: impl BlockRead + 'static) -> Self {
        let (thread, responses) = FsThread::start(Disk::new(disk), Box::new(|| ())).unwrap();
        Self { thread, responses, token: 0 }
    }

    /// Receives the reply to the last request; a minute without one is a hang.
    fn answer(&mut self) -> Result<Reply, FsError> {
        let answer = self.responses.recv_timeout(Duration::from_secs(60)).expect("an answer");
        assert_eq!(answer.token, self.token);
        answer.result
    }

    fn visit(&mut self, path: &str) -> Result<Target, FsError> {
        self.visit_index(path, false)
    }

    fn visit_index(&mut self, path: &str, index: bool) -> Result<Target, FsError> {
        self.token += 1;
        self.thread.visit(self.token, path.into(), index).unwrap();
        match self.answer()? {
            Reply::Visited(target) => Ok(target),
            other => panic!("{other:?}"),
        }
    }

    fn read(&mut self, handle: Handle, offset: u64, len: usize) -> Result<Vec<u8>, FsError> {
        self.token += 1;
        self.thread.read(self.token, handle, offset, vec![0; len]).unwrap();
        match self.answer()? {
            Reply::Read(bytes) => Ok(bytes),
            other => panic!("{other:?}"),
        }
    }

    fn read_all(&mut self, path: &str) -> Result<Vec<u8>, FsError> {
        let Target::File { handle, meta, .. } = self.visit(path)? else { panic!("{path}: a dir") };
        let mut all = Vec::new();
        loop {
            let part = self.read(handle, all.len() as u64, 65_536)?;
            if part.is_empty() {
                break;
            }
            all.extend_from_slice(&part);
        }
        assert_eq!(all.len() as u64, meta.len, "{path}");
        self.thread.close(handle);
        Ok(all)
    }
}

/// Creates a tree with all cases that a server has to handle.
fn tree(dir: &Path) {
    let put = |path: &str, bytes: &[u8]| {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let mut random = Pcg64Mcg::seed_from_u64(1);
    let mut noise = |len: usize| {
        let mut bytes = vec![0; len];
        random.fill_bytes(&mut bytes);
        bytes
    };
    put("empty", b"");
    put("one", b"1");
    put("block", &noise(4096));
    put("large.bin", &noise(3_000_001));
    put("deep/er/than/most/file.txt", b"found");
    put("site/index.html", b"<p>index");
    put("name with spaces & <tags>.txt", b"odd");
    for i in 0..300 {
        put(&format!("many/{i:03}-a-name-that-takes-some-room-in-a-directory"), &[i as u8]);
    }
}

fn tool(name: &str, args: &[&str]) -> bool {
    match Command::new(name).args(args).output() {
        Ok(out) => {
            assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
            true
        }
        Err(_) => {
            eprintln!("SKIPPED: {name} is not here; install e2fsprogs, dosfstools and mtools");
            false
        }
    }
}

fn ext_image(dir: &Path, kind: &str, more: &[&str]) -> Option<PathBuf> {
    let image = dir.join("disk.img");
    File::create(&image).unwrap().set_len(24 << 20).unwrap();
    let from = dir.join("tree").display().to_string();
    let mut args = vec!["-q", "-F", "-t", kind, "-d", &from];
    args.extend_from_slice(more);
    let path = image.display().to_string();
    args.push(&path);
    tool("mke2fs", &args).then_some(image)
}

fn every_file_is_equal(fs: &mut Fs, dir: &Path, under: &str) {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let path = format!("{under}/{}", entry.file_name().to_str().unwrap());
        if entry.file_type().unwrap().is_symlink() {
            continue;
        }
        if entry.path().is_dir() {
            every_file_is_equal(fs, &entry.path(), &path);
        } else {
            assert!(fs.read_all(&path).unwrap() == fs::read(entry.path()).unwrap(), "{path}");
        }
    }
    let Target::Dir { entries, left_out } = fs.visit(under).unwrap() else { panic!("{under}") };
    assert_eq!(left_out, 0);
    let mut listed: Vec<_> =
        entries.iter().map(|e| String::from_utf8(e.name.clone()).unwrap()).collect();
    let mut there: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    listed.retain(|n| n != "lost+found");
    listed.sort();
    there.sort();
    assert_eq!(listed, there);
}

#[test]
fn ext_files_read_back_equal() {
    for (kind, more) in [
        ("ext4", &["-b", "4096"][..]),
        ("ext4", &["-b", "1024", "-O", "^metadata_csum,64bit"]),
        ("ext4", &["-O", "inline_data"]),
        ("ext2", &[]),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("tree");
        tree(&from);
        let Some(image) = ext_image(dir.path(), kind, more) else { return };
        let mut fs = Fs::of(FileDisk::new(File::open(image).unwrap()).unwrap());
        every_file_is_equal(&mut fs, &from, "");
    }
}

#[test]
fn fat_files_read_back_equal() {
    for bits in ["12", "16", "32"] {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("tree");
        tree(&from);
        let odd = from.join("name with spaces & <tags>.txt");
        fs::rename(odd, from.join("name with spaces.txt")).unwrap();
        let image = dir.path().join("disk.img");
        let size = if bits == "32" { 64 } else { 24 };
        File::create(&image).unwrap().set_len(size << 20).unwrap();
        let path = image.display().to_string();
        let cluster = if bits == "12" { "64" } else { "1" };
        let cluster = if bits == "16" { "4" } else { cluster };
        if !tool("mkfs.vfat", &["-F", bits, "-s", cluster, &path]) {
            return;
        }
        for entry in fs::read_dir(&from).unwrap() {
            let entry = entry.unwrap().path().display().to_string();
            if !tool("mcopy", &["-s", "-i", &path, &entry, "::"]) {
                return;
            }
        }
        let mut fs = Fs::of(FileDisk::new(File::open(image).unwrap()).unwrap());
        every_file_is_equal(&mut fs, &from, "");
        assert_eq!(fs.read_all("/DEEP/er/Than/most/FILE.TXT").unwrap(), b"found");
    }
}

#[test]
fn ext_ranges_symlinks_and_missing_paths_are_resolved() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("tree");
    tree(&from);
    let link = |target: &str, name: &str| {
        std::os::unix::fs::symlink(target, from.join(name)).unwrap();
    };
    link("deep/er", "relative");
    link("/deep/er/than", "absolute");
    link("../../../../../../etc/passwd", "outside");
    link("loop-b", "loop-a");
    link("loop-a", "loop-b");
    link("nothing", "dangling");
    link(&"x/".repeat(400), "long");
    let Some(image) = ext_image(dir.path(), "ext4", &[]) else { return };
    let mut fs = Fs::of(FileDisk::new(File::open(image).unwrap()).unwrap());
    let large = fs::read(from.join("large.bin")).unwrap();

    assert_eq!(fs.read_all("/relative/than/most/file.txt").unwrap(), b"found");
    assert_eq!(fs.read_all("/absolute/../than/most/./file.txt").unwrap(), b"found");
    assert_eq!(fs.visit("/outside"), Err(FsError::NotFound), "symlinks cannot leave the disk");
    assert_eq!(fs.visit("/loop-a"), Err(FsError::TooFar));
    assert_eq!(fs.visit("/dangling"), Err(FsError::NotFound));
    assert_eq!(fs.visit("/long"), Err(FsError::NotFound));
    assert_eq!(fs.visit("/one/more"), Err(FsError::NotFound));
    assert_eq!(fs.visit(&format!("/{}", "x".repeat(300))), Err(FsError::NotFound));
    assert_eq!(fs.visit(&"/x".repeat(5000)), Err(FsError::NotFound));
    assert_eq!(fs.visit("/../../one").map(|t| matches!(t, Target::File { .. })), Ok(true));

    assert!(matches!(fs.visit_index("/site", true), Ok(Target::File { is_index: true, .. })));
    assert!(matches!(fs.visit("/site"), Ok(Target::Dir { .. })));
    assert!(matches!(fs.visit_index("/deep", true), Ok(Target::Dir { .. })));

    let Ok(Target::File { handle, .. }) = fs.visit("/large.bin") else { panic!() };
    for (offset, len) in [(2_999_990, 100), (0, 1), (131_000, 500), (4095, 2), (0, 300_000)] {
        let end = (offset + len).min(large.len());
        assert!(fs.read(handle, offset as u64, len).unwrap() == large[offset..end]);
    }
    assert_eq!(fs.read(handle, u64::MAX, 10), Ok(Vec::new()));
    fs.thread.close(handle);
    assert_eq!(fs.read(handle, 0, 10), Err(FsError::Stale));

    let Ok(Target::Dir { entries, .. }) = fs.visit("/") else { panic!() };
    let link = entries.iter().find(|e| e.name == b"relative").unwrap();
    assert_eq!(link.kind, Kind::Link);
}

#[test]
fn unsupported_disk_content_is_named_in_error() {
    let says = |bytes: Vec<u8>| {
        let error = Fs::of(MemDisk::new(bytes)).visit("/").unwrap_err();
        format!("{error}; {}", error.remedy().expect("a remedy"))
    };
    assert!(says(vec![0; 1 << 20]).contains("empty"));
    assert!(says(vec![]).contains("empty"));
    assert!(says(vec![7; 1 << 20]).contains("no ext2/3/4 or FAT"));
    let mut mbr = vec![0; 4096];
    (mbr[510], mbr[511]) = (0x55, 0xaa);
    assert!(says(mbr.clone()).contains("MBR"));
    mbr[512..520].copy_from_slice(b"EFI PART");
    assert!(says(mbr).contains("GPT"));
    let named = |parts: &[(usize, &[u8])], name: &str| {
        let mut disk = vec![0; 1 << 20];
        for (at, bytes) in parts {
            disk[*at..][..bytes.len()].copy_from_slice(bytes);
        }
        let told = says(disk);
        assert!(told.contains(name), "{told}");
    };
    let end: (usize, &[u8]) = (510, &[0x55, 0xaa]);
    // Its first sector is valid for FAT as well: sectors of 512 bytes, 8 per cluster, a fixed disk.
    let ntfs = [&b"\xeb\x52\x90NTFS    "[..], &[0, 2, 8, 0, 0, 0, 0, 0, 0, 0, 0xf8]].concat();
    let ntfs = &*[ntfs, vec![0; 2]].concat();
    named(&[(0, ntfs), end], "an NTFS file system; use a disk with ext2/3/4 or FAT");
    named(&[(0, b"\xeb\x76\x90EXFAT   "), end], "an exFAT file system");
    named(&[(0, b"XFSB")], "an XFS file system");
    named(&[(65_600, b"_BHRfS_M")], "a Btrfs file system");
    named(&[end, (512, b"EFI PART"), (32_769, b"CD001")], "an ISO 9660 file system");
    named(&[(512, b"LABELONE")], "an LVM physical volume; use one of its logical volumes");
    named(&[(0, b"LUKS\xba\xbe")], "a LUKS volume; unlock it");
    named(&[(4086, b"SWAPSPACE2")], "swap space");
    let mut cut = pvio_demo::image::image_bytes(8 << 20).unwrap();
    cut.truncate(6 << 20);
    assert!(says(cut).contains("cut short"));
}

/// A disk whose reads fail after a number of them.
struct Failing(MemDisk, u32);

impl BlockRead for Failing {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.1 = self.1.checked_sub(1).ok_or_else(|| io::Error::other("the backend is gone"))?;
        self.0.read_at(offset, buf)
    }
}

#[test]
fn failed_disk_read_is_reported_as_io_error() {
    let image = pvio_demo::image::image_bytes(8 << 20).unwrap();
    let mut fs = Fs::of(Failing(MemDisk::new(image), 3));
    let mut failed = 0;
    for path in ["/hello.txt", "/data/noise.bin", "/docs/try.md"] {
        match fs.read_all(path) {
            Ok(_) => {}
            Err(FsError::Io(why)) => failed += usize::from(why.contains("backend is gone")),
            Err(other) => panic!("{other}"),
        }
    }
    assert!(failed > 0);
}

/// Visits everything in an image, within bounds. Any result is accepted; only a hang is a failure.
fn visit_all_paths(fs: &mut Fs) {
    let mut todo = vec![String::new()];
    let mut seen = 0;
    while let Some(path) = todo.pop() {
        seen += 1;
        if seen > 60 {
            return;
        }
        let Ok(target) = fs.visit_index(&path, seen % 3 == 0) else { continue };
        match target {
            Target::File { handle, meta, .. } => {
                for offset in [0, meta.len / 2, meta.len.saturating_sub(5)] {
                    let _ = fs.read(handle, offset, 70_000);
                }
                fs.thread.close(handle);
            }
            Target::Dir { entries, .. } => {
                for entry in entries.iter().take(25) {
                    let name = String::from_utf8_lossy(&entry.name);
                    todo.push(format!("{path}/{name}"));
                }
            }
        }
    }
}

fn damaged(image: &[u8], seed: u64) -> Vec<u8> {
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let mut bytes = image.to_vec();
    // Mostly in the area of the file system's metadata.
    for _ in 0..1 + random.next_u32() % 40 {
        let near = [4096, 65_536, 1 << 20, bytes.len()][(random.next_u32() % 4) as usize];
        let at = random.next_u64() as usize % near.min(bytes.len());
        bytes[at] = [0, 0xff, 1, 0x80, random.next_u32() as u8][(random.next_u32() % 5) as usize];
    }
    if seed.is_multiple_of(7) {
        let len = random.next_u64() as usize % bytes.len();
        bytes.truncate(len);
    }
    bytes
}

#[test]
fn damaged_fat_never_panics_or_hangs() {
    let image = pvio_demo::image::image_bytes(6 << 20).unwrap();
    for seed in 0..150 {
        visit_all_paths(&mut Fs::of(MemDisk::new(damaged(&image, seed))));
    }
}

#[test]
fn damaged_ext_never_panics_or_hangs() {
    let dir = tempfile::tempdir().unwrap();
    tree(&dir.path().join("tree"));
    // Without checksums, damage is detected later.
    let more = ["-b", "1024", "-O", "^metadata_csum,^64bit"];
    let Some(image) = ext_image(dir.path(), "ext4", &more) else { return };
    let image = fs::read(image).unwrap();
    for seed in 0..150 {
        visit_all_paths(&mut Fs::of(MemDisk::new(damaged(&image, seed))));
    }
}

#[test]
fn circular_fat_cluster_chain_is_corrupt_error() {
    let mut image = pvio_demo::image::image_bytes(8 << 20).unwrap();
    // Every entry of both FATs refers to the same cluster, so every chain is a ring.
    let reserved = u16::from_le_bytes([image[14], image[15]]) as usize * 512;
    let sectors_per_fat = u16::from_le_bytes([image[22], image[23]]) as usize;
    let fats = image[16] as usize;
    for entry in image[reserved..reserved + fats * sectors_per_fat * 512].chunks_mut(2) {
        entry.copy_from_slice(&[3, 0]);
    }
    // In addition, a directory in such a ring that contains only deleted entries has no end.
    let mut fs = Fs::of(MemDisk::new(image.clone()));
    visit_all_paths(&mut fs);
    let root = reserved + fats * sectors_per_fat * 512;
    for entry in image[root + 16_384..].chunks_mut(32) {
        entry[0] = 0xe5;
    }
    let mut fs = Fs::of(MemDisk::new(image));
    let err = fs.visit("/docs").unwrap_err();
    assert_eq!(err.code(), "fs-corrupt", "{err}");
}
