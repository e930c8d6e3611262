//! File systems compared with Linux and mtools: all that they read is read here with the same
//! bytes, times and types.

use super::{Fs, tool};
use pvio_demo::guest::fs::{FileDisk, FsError, Kind, Target};
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// An ext image that is mounted in its own mount namespace, until dropped.
struct Mount {
    image: PathBuf,
    at: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Creates a file system with these options of mke2fs and mounts it for writing. Prints a
    /// message and returns `None` if mounting is not possible.
    fn new(dir: &Path, words: &[&str], size: u64) -> Option<Self> {
        let image = dir.join("disk.img");
        File::create(&image).unwrap().set_len(size).unwrap();
        let path = image.display().to_string();
        let args = [&["-q", "-F"], words, &[path.as_str()]].concat();
        if !tool("mke2fs", &args) {
            return None;
        }
        let at = dir.join("mnt");
        fs::create_dir_all(&at).unwrap();
        let mut mount = Self { image, at, mounted: false };
        mount.mount("rw").then_some(mount)
    }

    fn mount(&mut self, how: &str) -> bool {
        let options = format!("loop,{how}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "ext4", "-o", &options]).arg(&self.image).arg(&self.at);
        let out = mount.output().unwrap();
        self.mounted = out.status.success();
        if !self.mounted {
            let why = String::from_utf8_lossy(&out.stderr);
            eprintln!("SKIPPED: a file system cannot be mounted here: {}", why.trim());
        }
        self.mounted
    }

    fn unmount(&mut self) {
        if std::mem::take(&mut self.mounted) {
            assert!(Command::new("umount").arg(&self.at).status().unwrap().success());
        }
    }

    /// Mounts the image read-only and compares all files; returns their number.
    fn compare(&mut self) -> usize {
        self.unmount();
        assert!(self.mount("ro,noload"));
        let mut read = Fs::of(FileDisk::new(File::open(&self.image).unwrap()).unwrap());
        let files = same(&mut read, &self.at, "");
        self.unmount();
        files
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Command::new("umount").arg(&self.at).status();
        }
    }
}

/// Compares a directory with Linux's view of it.
fn same(read: &mut Fs, linux: &Path, path: &str) -> usize {
    let Target::Dir { entries, left_out } = read.visit(&format!("{path}/")).unwrap() else {
        panic!("{path} is no directory")
    };
    let mut names: Vec<_> = entries.iter().map(|e| e.name.clone()).collect();
    let listed = fs::read_dir(linux).unwrap().map(|e| e.unwrap().file_name());
    let mut wanted: Vec<_> = listed.map(|name| name.into_encoded_bytes()).collect();
    names.sort();
    wanted.sort();
    if left_out == 0 {
        assert_eq!(names, wanted, "{path}");
    }
    let mut files = 0;
    for entry in entries {
        let name = String::from_utf8(entry.name.clone()).unwrap();
        let (inside, below) = (format!("{path}/{name}"), linux.join(&name));
        let meta = fs::symlink_metadata(&below).unwrap();
        assert_eq!(entry.meta.modified, Some(meta.mtime()), "{inside}");
        match entry.kind {
            Kind::Dir => files += same(read, &below, &inside),
            Kind::File => {
                assert_eq!(entry.meta.len, meta.len(), "{inside}");
                if meta.len() < 64 << 20 {
                    let (ours, theirs) =
                        (read.read_all(&inside).unwrap(), fs::read(&below).unwrap());
                    assert!(ours == theirs, "{inside} has other bytes");
                } else {
                    ends_are_the_same(read, &below, &inside, meta.len());
                }
                files += 1;
            }
            Kind::Link => {
                let through = read.visit(&inside);
                match fs::metadata(&below) {
                    Ok(meta) if meta.is_file() => {
                        assert!(matches!(through, Ok(Target::File { .. })), "{inside}");
                    }
                    _ => drop(through),
                }
            }
            Kind::Special => assert!(!meta.is_file() && !meta.is_dir(), "{inside}"),
        }
    }
    files
}

/// Compares the start and end of a file that is too large to be read as a whole.
fn ends_are_the_same(read: &mut Fs, linux: &Path, path: &str, len: u64) {
    use std::os::unix::fs::FileExt;
    let Target::File { handle, .. } = read.visit(path).unwrap() else { panic!("{path}") };
    let file = File::open(linux).unwrap();
    for at in [0, 4096, len / 2, len - 5000, len - 1] {
        let mut wanted = vec![0; usize::try_from(len - at).unwrap_or(usize::MAX).min(9000)];
        file.read_exact_at(&mut wanted, at).unwrap();
        assert!(read.read(handle, at, wanted.len()).unwrap() == wanted, "{path} at {at}");
    }
    read.thread.close(handle);
}

fn write_at(path: &Path, at: u64, bytes: &[u8]) {
    let mut file = OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
}

fn fallocate(path: &Path, args: &[&str]) {
    let path = path.display().to_string();
    assert!(Command::new("fallocate").args(args).arg(path).status().unwrap().success());
}

/// Fills a volume with the cases to compare: holes, unwritten extents, many extents, links, times.
fn fill(at: &Path) {
    let noise: Vec<u8> =
        (0..300_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(at.join("small"), b"a few bytes").unwrap();
    fs::write(at.join("of-a-hundred"), &noise[..100]).unwrap();
    fs::write(at.join("noise"), &noise).unwrap();
    // Old contents, then unwritten extents allocated over them.
    for n in 0..20 {
        fs::write(at.join(format!("secret-{n}")), vec![b'S'; 200_000]).unwrap();
    }
    assert!(Command::new("sync").status().unwrap().success());
    for n in 0..20 {
        fs::remove_file(at.join(format!("secret-{n}"))).unwrap();
    }
    assert!(Command::new("sync").status().unwrap().success());
    let unwritten = at.join("unwritten");
    fs::write(&unwritten, b"begin").unwrap();
    fallocate(&unwritten, &["-l", "3000000"]);
    write_at(&unwritten, 1_500_000, b"in between");
    let holes = at.join("holes");
    for n in 0..400 {
        write_at(&holes, n * 16_384 + 77, &[n as u8 | 1; 50]);
    }
    let sparse = at.join("sparse");
    write_at(&sparse, 0, &noise[..5000]);
    write_at(&sparse, 100 << 30, b"far away");
    fs::create_dir_all(at.join("d/e")).unwrap();
    for n in 0..700 {
        fs::write(at.join(format!("d/e/{n:04}-with-a-name-of-some-length")), n.to_string())
            .unwrap();
    }
    std::os::unix::fs::symlink("d/e/0007-with-a-name-of-some-length", at.join("link")).unwrap();
    let long = format!("{}noise", "./".repeat(200));
    std::os::unix::fs::symlink(long, at.join("long-link")).unwrap();
    for (name, time) in
        [("1902", "1902-01-01"), ("1969", "1969-12-31 23:00"), ("2100", "2100-06-01")]
    {
        let path = at.join(format!("changed-in-{name}"));
        fs::write(&path, name).unwrap();
        assert!(Command::new("touch").args(["-d", time]).arg(path).status().unwrap().success());
    }
}

#[test]
fn ext_of_every_variant_reads_same_as_linux() {
    for words in [
        &["-t", "ext4"][..],
        &["-t", "ext4", "-b", "1024"],
        &["-t", "ext4", "-I", "128", "-O", "metadata_csum"],
        &["-t", "ext4", "-O", "inline_data", "-I", "512"],
        &["-t", "ext4", "-O", "mmp,large_dir,ea_inode,metadata_csum_seed"],
        &["-t", "ext4", "-O", "^64bit,^metadata_csum,^flex_bg", "-b", "2048"],
        &["-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024"],
        &["-t", "ext4", "-O", "sparse_super2,^resize_inode"],
        &["-t", "ext4", "-O", "bigalloc", "-C", "16384"],
        &["-t", "ext4", "-O", "casefold"],
        &["-t", "ext3"],
        &["-t", "ext2", "-b", "1024"],
        &["-t", "ext2", "-r", "0"],
    ] {
        let dir = tempfile::tempdir().unwrap();
        let Some(mut mount) = Mount::new(dir.path(), words, 192 << 20) else {
            if words.contains(&"casefold") || words.contains(&"-r") {
                continue;
            }
            return;
        };
        if words.contains(&"ext2") || words.contains(&"ext3") {
            // Without extents, there are no unwritten extents and no files of that size.
            fs::write(mount.at.join("plain"), vec![7; 5_000_000]).unwrap();
            for n in 0..60 {
                write_at(&mount.at.join("holes"), n * 300_000 + 77, &[n as u8 | 1; 50]);
            }
            fs::create_dir(mount.at.join("d")).unwrap();
            for n in 0..300 {
                fs::write(mount.at.join(format!("d/{n}")), n.to_string()).unwrap();
            }
        } else {
            fill(&mount.at);
        }
        let files = mount.compare();
        println!("{words:?}: {files} files");
        assert!(files > 100, "{words:?}: {files} files");
    }
}

/// Changes bytes of the superblock and has its checksum corrected, or left out.
fn patch(image: &Path, at: u64, bytes: &[u8]) {
    write_at(image, 1024 + at, bytes);
}

#[test]
fn ext_with_any_directory_hash_is_read() {
    let dir = tempfile::tempdir().unwrap();
    // Without a checksum of the superblock, which a changed byte would invalidate.
    let words = ["-t", "ext4", "-O", "^metadata_csum"];
    let Some(mut mount) = Mount::new(dir.path(), &words, 64 << 20) else { return };
    for n in 0..2000 {
        fs::write(mount.at.join(format!("{n:04}-with-a-name-of-some-length")), n.to_string())
            .unwrap();
    }
    mount.unmount();
    // Other directory hashes, including an unknown one; signed and unsigned.
    for (hash, flags) in [(0, 1_u32), (1, 2), (2, 1), (5, 2), (77, 0)] {
        patch(&mount.image, 252, &[hash]);
        patch(&mount.image, 0x160, &flags.to_le_bytes());
        let mut read = Fs::of(FileDisk::new(File::open(&mount.image).unwrap()).unwrap());
        let bytes = read.read_all("/1234-with-a-name-of-some-length").unwrap();
        assert_eq!(bytes, b"1234", "hash {hash}, flags {flags}");
    }
}

#[test]
fn ext_with_unreplayed_journal_is_rejected_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut mount) = Mount::new(dir.path(), &["-t", "ext4"], 64 << 20) else { return };
    fs::write(mount.at.join("file"), b"in the journal").unwrap();
    assert!(Command::new("sync").status().unwrap().success());
    // A copy of a volume that is in use.
    let copy = dir.path().join("copy.img");
    fs::copy(&mount.image, &copy).unwrap();
    mount.unmount();
    let refused =
        Fs::of(FileDisk::new(File::open(&copy).unwrap()).unwrap()).visit("/").unwrap_err();
    assert!(matches!(refused, FsError::Journal), "{refused}");
    assert!(refused.remedy().is_some_and(|remedy| remedy.contains("e2fsck -p")), "{refused}");
    // Exit code 1: errors were corrected.
    let replayed = Command::new("e2fsck").args(["-f", "-y"]).arg(&copy).status().unwrap();
    assert!(replayed.code().is_some_and(|code| code <= 1), "{replayed}");
    let mut read = Fs::of(FileDisk::new(File::open(&copy).unwrap()).unwrap());
    assert_eq!(read.read_all("/file").unwrap(), b"in the journal");
}

/// A FAT volume with a directory and a few files, made by mtools; `None` if mtools is not
/// installed.
fn fat(dir: &Path, words: &[&str], mib: u64) -> Option<(PathBuf, Vec<u8>)> {
    let image = dir.join("fat.img");
    let _ = fs::remove_file(&image);
    File::create(&image).unwrap().set_len(mib << 20).unwrap();
    let path = image.display().to_string();
    if !tool("mkfs.vfat", &[words, &[path.as_str()]].concat()) {
        return None;
    }
    let bytes: Vec<u8> = (0..700_000_u32).map(|i| (i.wrapping_mul(40_503) >> 7) as u8).collect();
    let from = dir.join("A file with a long name.bin");
    fs::write(&from, &bytes).unwrap();
    let made = tool("mmd", &["-i", &path, "::/sub"])
        && tool("mcopy", &["-i", &path, &from.display().to_string(), "::/sub"]);
    made.then_some((image, bytes))
}

#[test]
fn fat_with_unusual_fields_is_read() {
    let dir = tempfile::tempdir().unwrap();
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 4] = [
        ("nothing", |_| ()),
        ("FSInfo of zeros", |image| write_at(image, 512, &[0; 512])),
        ("FSInfo of another place", |image| write_at(image, 48, &[0xff, 0xff])),
        ("no copy of the boot sector", |image| write_at(image, 50, &[0xff, 0xff])),
    ];
    for mib in [40, 8] {
        for (what, damage) in damages {
            let Some((image, bytes)) = fat(dir.path(), &["-F", "32", "-s", "1"], 40) else {
                return;
            };
            if mib < 40 {
                // Fewer clusters than FAT32 should have: Linux reads such a volume, but mtools does
                // not create one.
                let sectors = u32::try_from((mib << 20) / 512).unwrap();
                write_at(&image, 32, &sectors.to_le_bytes());
                OpenOptions::new().write(true).open(&image).unwrap().set_len(mib << 20).unwrap();
            }
            damage(&image);
            let mut read = Fs::of(FileDisk::new(File::open(&image).unwrap()).unwrap());
            let got = read.read_all("/sub/A file with a long name.bin");
            assert!(got.as_ref() == Ok(&bytes), "{mib} MiB, {what}: {:?}", got.err());
        }
    }
    for words in [&["-F", "12", "-s", "8"][..], &["-F", "16", "-s", "1"]] {
        let Some((image, bytes)) = fat(dir.path(), words, 8) else { return };
        // Both sector counts set: the first one applies.
        let sectors = (8_u32 << 20) / 512;
        write_at(&image, 32, &sectors.to_le_bytes());
        let mut read = Fs::of(FileDisk::new(File::open(&image).unwrap()).unwrap());
        assert!(read.read_all("/SUB/a FILE with a long name.bin") == Ok(bytes), "{words:?}");
    }
    // FAT32 with the 16-bit sector count, which can represent 32 MiB less a sector.
    let Some((image, bytes)) = fat(dir.path(), &["-F", "32", "-s", "1"], 40) else { return };
    write_at(&image, 19, &u16::MAX.to_le_bytes());
    let mut read = Fs::of(FileDisk::new(File::open(&image).unwrap()).unwrap());
    assert!(read.read_all("/sub/A file with a long name.bin") == Ok(bytes));
}
