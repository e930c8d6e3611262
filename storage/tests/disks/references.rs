//! Files that the header of an image names: which of them are opened, and with which access.

mod devices;
mod paths;

use crate::support::{Deed, Machine, has, text, tool};
use pvio_ring::error::{Remedy, Report};
use pvio_storage::image::inspect::inspect_as;
use pvio_storage::image::{Disk, HandedFiles, Image, ImageError, Resolved, resolve};
use pvio_xenbus::handshake::vbd::Mode;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

const SIZE: usize = 1 << 20;

/// A directory with the images of one tenant, and one with those of another.
struct Tenants {
    _dir: TempDir,
    own: PathBuf,
    other: PathBuf,
}

impl Tenants {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (dir.path().join("own"), dir.path().join("other"));
        for (folder, byte) in [(&own, 1), (&other, 2)] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("base.img"), vec![byte; SIZE]).unwrap();
        }
        Self { _dir: dir, own, other }
    }

    /// Names of the other tenant's file, as an image of the first tenant could contain them.
    fn names_outside(&self) -> Vec<String> {
        symlink("../other/base.img", self.own.join("link.img")).unwrap();
        symlink(self.other.join("base.img"), self.own.join("absolute.img")).unwrap();
        symlink("../other", self.own.join("folder")).unwrap();
        symlink("/", self.own.join("slash")).unwrap();
        fs::create_dir(self.own.join("sub")).unwrap();
        let other = self.other.join("base.img");
        let process = format!("/proc/self/root{}", text(&other));
        vec![
            "../other/base.img".into(),
            "sub/../../other/base.img".into(),
            text(&other).into(),
            format!("/{}", text(&other)),
            "link.img".into(),
            "absolute.img".into(),
            "folder/base.img".into(),
            format!("slash{}", text(&other)),
            process,
        ]
    }
}

fn open(disk: &str) -> Result<Image, ImageError> {
    Image::open_as(&disk.parse::<Disk>().unwrap())
}

/// Resolves a disk for a process that opens nothing.
fn resolved(disk: &Disk) -> Result<Resolved, ImageError> {
    resolve(disk, &HandedFiles::open_named(disk)?)
}

/// Returns an error's text, causes and remedy.
fn whole(error: &ImageError) -> String {
    format!("{}; {}", Report(error), error.remedy().unwrap_or_default())
}

/// Opens a disk in every way and returns the error, which must be the same each time.
fn refused(spec: &str) -> (&'static str, String) {
    let found = ["[ro]", "[rw]", "[overlay]", "[ro,direct]"].map(|options| {
        let disk = format!("{options}{spec}");
        let error = open(&disk).expect_err(spec);
        let resolving = resolved(&disk.parse().unwrap()).expect_err(spec);
        assert_eq!(whole(&resolving), whole(&error), "{disk}: another error when it is resolved");
        (error.code(), whole(&error))
    });
    for other in &found[1..] {
        assert_eq!(found[0].0, other.0, "{spec}: {} or {}", found[0].1, other.1);
    }
    let looked = inspect_as(&spec.parse().unwrap()).unwrap();
    assert_eq!(looked.problem.expect(spec).code(), found[0].0, "{spec}");
    assert!(looked.files.len() <= 1, "{spec}");
    let [first, ..] = found;
    first
}

fn refused_as(spec: &str, code: &str, named: &[&str]) {
    let (found, error) = refused(spec);
    assert_eq!(found, code, "{error}");
    for name in named {
        assert!(error.contains(name), "{name} is not in: {error}");
    }
}

/// Creates a qcow2 image with a backing file of that name, which need not exist.
fn qcow2(image: &Path, format: &str, name: &str) {
    let _ = fs::remove_file(image);
    let args = ["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", name, text(image), "1M"];
    tool("qemu-img", &args);
}

/// Creates a VMDK descriptor that names one extent.
fn vmdk(image: &Path, kind: &str, name: &[u8]) {
    let sectors = SIZE / 512;
    let head = format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
         createType=\"custom\"\nRW {sectors} {kind} \""
    );
    fs::write(image, [head.as_bytes(), name, b"\" 0\n"].concat()).unwrap();
}

/// Replaces bytes that occur once in an image.
fn patched(image: &Path, from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(image).unwrap();
    let places: Vec<usize> =
        bytes.windows(from.len()).enumerate().filter(|(_, w)| *w == from).map(|(i, _)| i).collect();
    for at in places {
        bytes[at..at + to.len()].copy_from_slice(to);
    }
    fs::write(image, bytes).unwrap();
}

/// Returns the disk's first sector.
fn first_sector(disk: &str) -> Vec<u8> {
    let disk: Disk = disk.parse().unwrap();
    // In the toolstack's form, with the options after the format.
    let (spec, options) = (disk.spec.to_string(), &disk.options);
    let (format, path) = spec.split_once(':').unwrap();
    let mut guest = Machine::new().disk(&format!("{format}:[{options}]{path}"), Mode::ReadOnly);
    let found = guest.one(Deed::Read(0, 1));
    guest.close();
    found
}

#[test]
fn backing_file_outside_image_roots_is_rejected() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let tenants = Tenants::new();
    let image = tenants.own.join("a.qcow2");
    let other = tenants.other.join("base.img");
    for name in tenants.names_outside() {
        for format in ["raw", "qcow2"] {
            qcow2(&image, format, &name);
            let spec = format!("qcow2:{}", text(&image));
            refused_as(&spec, "image-outside-root", &[text(&image), &name, "--image-root"]);
        }
        qcow2(&image, "raw", &format!("file:{name}"));
        refused_as(&format!("qcow2:{}", text(&image)), "image-outside-root", &[&name]);
    }
    // The rejected file exists, and a file in the same directory is permitted.
    qcow2(&image, "raw", "base.img");
    assert_eq!(first_sector(&format!("qcow2:{}", text(&image))), [1; 512]);
    let base = tenants.own.join("base.img");
    for name in [text(&base), "./base.img", "sub/../base.img"] {
        qcow2(&image, "raw", name);
        assert_eq!(first_sector(&format!("qcow2:{}", text(&image))), [1; 512], "{name}");
    }
    // The operator permits it.
    for name in ["../other/base.img", text(&other), "link.img", "absolute.img", "folder/base.img"] {
        qcow2(&image, "raw", name);
        let root = text(&tenants.other);
        let found =
            first_sector(&format!("[image-root=/nowhere,image-root={root}]{}", text(&image)));
        assert_eq!(found, [2; 512], "{name}");
    }
    assert!(fs::read(&other).unwrap() == vec![2; SIZE]);
}

/// Names are relative to the directory of each image in the chain; the roots stay those of the top
/// image.
#[test]
fn backing_chain_is_confined_to_roots_of_top_image() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let tenants = Tenants::new();
    let sub = tenants.own.join("sub");
    fs::create_dir(&sub).unwrap();
    fs::write(sub.join("base.img"), vec![3; SIZE]).unwrap();
    let top = tenants.own.join("top.qcow2");
    qcow2(&top, "qcow2", "sub/mid.qcow2");
    let spec = format!("qcow2:{}", text(&top));
    for (name, byte) in [("base.img", 3), ("../base.img", 1)] {
        qcow2(&sub.join("mid.qcow2"), "raw", name);
        assert_eq!(first_sector(&spec), [byte; 512], "{name}");
    }
    qcow2(&sub.join("mid.qcow2"), "raw", "../../other/base.img");
    refused_as(&spec, "image-outside-root", &["sub/mid.qcow2", "../../other/base.img"]);
    // When it is served on its own, the middle image has a smaller root.
    qcow2(&sub.join("mid.qcow2"), "raw", "../base.img");
    let mid = format!("qcow2:{}", text(&sub.join("mid.qcow2")));
    refused_as(&mid, "image-outside-root", &["mid.qcow2"]);
    // A backing file that names the image above it, by another path.
    symlink("top.qcow2", tenants.own.join("again.qcow2")).unwrap();
    qcow2(&sub.join("mid.qcow2"), "qcow2", "../again.qcow2");
    refused_as(&spec, "image-chain", &["depends on the image itself"]);
}

#[test]
fn reference_that_is_not_regular_file_is_rejected_unopened() {
    if !has("qemu-img", "qemu-utils") || !has("mkfifo", "coreutils") {
        return;
    }
    let tenants = Tenants::new();
    let image = tenants.own.join("a.qcow2");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let secret = tenants.other.join("base.img");
    for name in [
        format!("nbd://127.0.0.1:{port}/x"),
        format!("nbd:127.0.0.1:{port}"),
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"filename\":\"{}\"}}}}", text(&secret)),
        "fat:rw:/".into(),
        "host_device:/dev/sda".into(),
    ] {
        // qemu-img would resolve the name, so it is patched in afterwards.
        let place = "x".repeat(name.len());
        qcow2(&image, "raw", &place);
        patched(&image, place.as_bytes(), name.as_bytes());
        refused_as(&format!("qcow2:{}", text(&image)), "image-chain", &[&name, "only files"]);
    }
    assert!(listener.accept().is_err(), "connection to the address in the image");
    // Opening a FIFO for reading would wait for a writer.
    tool("mkfifo", &[text(&tenants.own.join("fifo"))]);
    for name in ["fifo", ".", "sub/../fifo"] {
        let _ = fs::create_dir(tenants.own.join("sub"));
        qcow2(&image, "raw", name);
        refused_as(&format!("qcow2:{}", text(&image)), "image-not-a-disk", &[name]);
        let descriptor = tenants.own.join("a.vmdk");
        vmdk(&descriptor, "FLAT", name.as_bytes());
        let error = open(&format!("[ro]{}", text(&descriptor))).unwrap_err();
        assert_eq!(error.code(), "image-not-a-disk", "{error}");
    }
    qcow2(&image, "raw", "none.img");
    let (code, error) = refused(&format!("qcow2:{}", text(&image)));
    assert_eq!(code, "image-missing");
    assert!(error.contains("none.img") && !error.contains("truncate"), "{error}");
}

#[test]
fn backing_file_without_format_is_rejected_and_never_probed() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    // A guest used the file as its raw disk before, and wrote a header to it that names a secret.
    let tenants = Tenants::new();
    let (image, disk) = (tenants.own.join("a.qcow2"), tenants.own.join("disk.img"));
    qcow2(&disk, "raw", text(&tenants.other.join("base.img")));
    qcow2(&image, "raw", "disk.img");
    // Named as raw, it is read as raw, whatever its content.
    let found = first_sector(&format!("qcow2:{}", text(&image)));
    assert_eq!(found[..4], *b"QFI\xfb");
    patched(&image, &[0xe2, 0x79, 0x2a, 0xca], &[0x12, 0x34, 0x56, 0x78]);
    refused_as(&format!("qcow2:{}", text(&image)), "image-chain", &["never detected"]);
    // A file named as qcow2 stays within the roots.
    qcow2(&image, "qcow2", "disk.img");
    refused_as(&format!("qcow2:{}", text(&image)), "image-outside-root", &["disk.img", "other"]);
}

#[test]
fn data_file_is_opened_only_below_roots_and_if_feature_bit_is_set() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let tenants = Tenants::new();
    let image = tenants.own.join("a.qcow2");
    let make = |name: &str| {
        let _ = fs::remove_file(&image);
        let place = tenants.own.join("d".repeat(name.len()));
        // qemu-img creates the file as well.
        let option = format!("data_file={}", text(&place));
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &option, text(&image), "1M"]);
        let write = ["-f", "qcow2", "-c", "write -P 4 0 64k", text(&image)];
        tool("qemu-io", &write);
        let whole = text(&place).to_owned();
        let name = format!("{name}{}", "\0".repeat(whole.len() - name.len()));
        (whole, name)
    };
    // As named by qemu-img.
    make("data.raw");
    let spec = format!("qcow2:{}", text(&image));
    assert_eq!(first_sector(&format!("[ro]{spec}")), [4; 512]);
    for outside in tenants.names_outside() {
        let (from, _) = make(&outside);
        // The new name is shorter, so the extension's length is changed as well.
        let mut bytes = fs::read(&image).unwrap();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let padded = from.len().next_multiple_of(8);
        bytes[at - 4..at].copy_from_slice(&(outside.len() as u32).to_be_bytes());
        bytes[at..at + padded].fill(0);
        bytes[at..at + outside.len()].copy_from_slice(outside.as_bytes());
        // An unknown extension fills the rest of the space.
        let next = at + outside.len().next_multiple_of(8);
        if next < at + padded {
            bytes[next..next + 4].copy_from_slice(&[0x55; 4]);
            let rest = (at + padded - next - 8) as u32;
            bytes[next + 4..next + 8].copy_from_slice(&rest.to_be_bytes());
        }
        fs::write(&image, &bytes).unwrap();
        let error = open(&format!("[ro]{spec}")).unwrap_err();
        assert_eq!(error.code(), "image-outside-root", "{error}");
        assert!(error.to_string().contains(&outside), "{error}");
        // Without the feature bit the name has no meaning, and the file is not located at all.
        let mut bytes = fs::read(&image).unwrap();
        bytes[79] &= !4;
        // In that case the image has no clusters in it either.
        let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
        bytes[l1..l1 + 8].fill(0);
        fs::write(&image, bytes).unwrap();
        assert_eq!(first_sector(&format!("[ro]{spec}")), [0; 512], "{outside}");
        let looked = inspect_as(&spec.parse().unwrap()).unwrap();
        assert!(looked.problem.is_none(), "{:?}", looked.problem);
    }
    assert!(fs::read(tenants.other.join("base.img")).unwrap() == vec![2; SIZE]);
}

#[test]
fn vmdk_extent_outside_image_roots_is_rejected() {
    let tenants = Tenants::new();
    let image = tenants.own.join("a.vmdk");
    for name in tenants.names_outside() {
        for kind in ["FLAT", "SPARSE"] {
            vmdk(&image, kind, name.as_bytes());
            for options in ["[ro]", "[overlay]", "[rw,write-extents=any]"] {
                let error = open(&format!("{options}{}", text(&image))).expect_err(&name);
                assert_eq!(error.code(), "image-outside-root", "{options} {error}");
                assert!(error.to_string().contains(text(&image)), "{error}");
                assert!(error.to_string().contains(&name), "{error}");
            }
            let error = open(&format!("[rw]{}", text(&image))).expect_err(&name);
            assert_eq!(error.code(), "image-extent-name", "{error}");
        }
    }
    vmdk(&image, "FLAT", b"base.img");
    assert_eq!(first_sector(&format!("vmdk:{}", text(&image))), [1; 512]);
    assert!(fs::read(tenants.other.join("base.img")).unwrap() == vec![2; SIZE]);
}

/// One tenant's images in one directory: an image must not write another one.
#[test]
fn vmdk_extent_is_written_only_if_name_derives_from_descriptor() {
    let tenants = Tenants::new();
    let (own, image) = (&tenants.own, tenants.own.join("a.vmdk"));
    let victim = own.join("base.img");
    symlink("base.img", own.join("a-flat.vmdk")).unwrap();
    symlink(text(&victim), own.join("a-f001.vmdk")).unwrap();
    for (name, bytes) in
        [("b-flat.vmdk", 5), ("a-s01.vmdk", 5), ("a-flat.img", 5), ("ab-flat.vmdk", 5)]
    {
        fs::write(own.join(name), vec![bytes; SIZE]).unwrap();
    }
    for name in [
        "base.img",
        text(&victim),
        "b-flat.vmdk",
        "a-s01.vmdk",
        "a-flat.img",
        "ab-flat.vmdk",
        // Derived, but a link to another image.
        "a-flat.vmdk",
        "a-f001.vmdk",
    ] {
        vmdk(&image, "FLAT", name.as_bytes());
        let error = open(&format!("[rw]{}", text(&image))).expect_err(name);
        assert_eq!(error.code(), "image-extent-name", "{error}");
        let words = whole(&error);
        for word in [text(&image), name, "read-only", "write-extents=any"] {
            assert!(words.contains(word), "{word} is not in: {words}");
        }
        // For reading, or with the operator's permission.
        open(&format!("[ro]{}", text(&image))).unwrap();
        open(&format!("[overlay]{}", text(&image))).unwrap();
        open(&format!("[rw,write-extents=any]{}", text(&image))).unwrap();
    }
    assert!(fs::read(&victim).unwrap() == vec![1; SIZE]);
    for name in ["a-flat.vmdk", "a-s001.vmdk", "a-f012.vmdk", "a-s1000.vmdk"] {
        let _ = fs::remove_file(own.join(name));
        fs::write(own.join(name), vec![6; SIZE]).unwrap();
        vmdk(&image, "FLAT", name.as_bytes());
        let mut guest = Machine::new().disk(&format!("vmdk:{}", text(&image)), Mode::ReadWrite);
        guest.one(Deed::Write(0, vec![7; 512]));
        guest.close();
        assert_eq!(fs::read(own.join(name)).unwrap()[..513], [&[7; 512][..], &[6]].concat());
        vmdk(&image, "FLAT", text(&own.join(name)).as_bytes());
        open(&format!("[rw]{}", text(&image))).unwrap();
    }
}

/// The image that the operator names is opened, wherever its path leads.
#[test]
fn image_path_given_by_operator_may_lead_outside_roots() {
    let tenants = Tenants::new();
    symlink("../other/base.img", tenants.own.join("mine.img")).unwrap();
    assert_eq!(first_sector(&format!("raw:{}", text(&tenants.own.join("mine.img")))), [2; 512]);
    // A root whose name contains the separators of options.
    let root = tenants.own.join("a,b] c%");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("x.img"), vec![9; SIZE]).unwrap();
    let image = tenants.other.join("a.vmdk");
    vmdk(&image, "FLAT", text(&root.join("x.img")).as_bytes());
    let mut disk: Disk = format!("vmdk:{}", text(&image)).parse().unwrap();
    assert_eq!(Image::open_as(&disk).unwrap_err().code(), "image-extent-name");
    disk.options.read_only = Some(true);
    disk.options.image_roots = Some(vec![root]);
    Image::open_as(&disk).unwrap();
    assert_eq!(disk.to_string().parse(), Ok(disk.clone()));
    assert_eq!(first_sector(&disk.to_string()), [9; 512]);
}

/// The parent's data is not in the image: no advice may lead to its loss.
#[test]
fn error_for_image_with_parent_does_not_suggest_conversion() {
    if !has("qemu-img", "qemu-utils") {
        return;
    }
    let tenants = Tenants::new();
    let image = tenants.own.join("a.vhd");
    tool("qemu-img", &["create", "-q", "-f", "vpc", text(&image), "1M"]);
    let mut bytes = fs::read(&image).unwrap();
    let end = bytes.len() - 512;
    for at in [0, end] {
        bytes[at + 60..at + 68].fill(0);
        bytes[at + 63] = 4;
        let sum: u32 = bytes[at..at + 512].iter().map(|b| u32::from(*b)).sum();
        bytes[at + 64..at + 68].copy_from_slice(&(!sum).to_be_bytes());
    }
    fs::write(&image, bytes).unwrap();
    let descriptor = tenants.own.join("a.vmdk");
    vmdk(&descriptor, "FLAT", b"base.img");
    patched(&descriptor, b"parentCID=ffffffff", b"parentCID=12345678");
    // In this one, other unsupported features come first.
    let unknown = tenants.own.join("b.vmdk");
    let text_of = fs::read_to_string(&descriptor).unwrap();
    let lines: Vec<&str> = text_of.lines().collect();
    let (parent, others): (Vec<&str>, Vec<&str>) =
        lines.into_iter().partition(|line| line.starts_with("parentCID"));
    let others = others.join("\n").replace("FLAT", "VMFSSPARSE");
    fs::write(&unknown, format!("{others}\n{}\n", parent[0])).unwrap();
    for image in [image, descriptor, unknown] {
        let error = open(&format!("[ro]{}", text(&image))).unwrap_err();
        assert_eq!(error.code(), "image-feature");
        let error = whole(&error);
        assert!(error.contains("parent") && error.contains("make a new image of both"), "{error}");
        assert!(!error.contains("-O qcow2"), "{error}");
    }
}
