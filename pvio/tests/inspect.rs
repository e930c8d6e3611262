//! `pvio inspect` of images made by qemu-img, valid and damaged ones.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn pvio(args: &[&str]) -> (String, String, Option<i32>) {
    let Output { stdout, stderr, status } =
        Command::new(env!("CARGO_BIN_EXE_pvio")).arg("inspect").args(args).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(stdout), text(stderr), status.code())
}

fn qemu_img(args: &[&str]) {
    let run = || Command::new("qemu-img").args(args).output().unwrap();
    let mut output = run();
    // qemu-img measures the speed of key derivation, which can fail on a busy machine.
    for _ in 0..20 {
        if !String::from_utf8_lossy(&output.stderr).contains("accurate CPU usage") {
            break;
        }
        output = run();
    }
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn has_qemu_img() -> bool {
    let there = Command::new("qemu-img").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !there {
        eprintln!("SKIPPED: qemu-img is not there; install qemu-utils");
    }
    there
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn inspect_shows_backing_chain_and_snapshots() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    qemu_img(&["create", "-q", "-f", "raw", text(&path("base.img")), "8M"]);
    let (base, top) = (path("base.img"), path("top.qcow2"));
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&base), text(&top), "16M"]);
    qemu_img(&["snapshot", "-c", "before the upgrade", text(&top)]);
    let (out, err, code) = pvio(&[text(&top)]);
    assert_eq!((err.as_str(), code), ("", Some(0)));
    for line in [
        "size        16.0 MiB (16777216 bytes)",
        "  format    qcow2, version 3, clusters of 65536 bytes",
        "  in use    no",
        "  snapshot  before the upgrade (id 1), 16.0 MiB",
        &format!("rests on    {}", text(&base)),
        "it can be served",
    ] {
        assert!(out.lines().any(|l| l == line), "{line} is not in\n{out}");
    }
    let (out, _, _) = pvio(&["--json", text(&top)]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["size"], 16 << 20);
    assert_eq!(json["files"][0]["snapshots"][0]["name"], "before the upgrade");
    assert_eq!(json["files"][1]["format"], "raw");
    assert_eq!(json["problem"], serde_json::Value::Null);
}

/// Inspects a damaged image and checks the error.
fn broken(path: &Path, words: &[&str], code: i32) {
    let (_, err, exit) = pvio(&[text(path)]);
    assert_eq!(exit, Some(code), "{err}");
    let lines: Vec<&str> = err.lines().collect();
    assert!(lines.len() == 2 && lines[1].starts_with("help: "), "{err}");
    for word in words {
        assert!(err.contains(word), "{word} is not in: {err}");
    }
}

#[test]
fn inspect_reports_problem_with_advice() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let make = |name: &str, args: &[&str]| -> PathBuf {
        let file = path(name);
        qemu_img(&[&["create", "-q"], args, &[text(&file), "4M"]].concat());
        file
    };
    broken(&path("none.qcow2"), &["does not exist"], 2);

    let plain = make("plain.qcow2", &["-f", "qcow2"]);
    let bytes = std::fs::read(&plain).unwrap();
    std::fs::write(path("short.qcow2"), &bytes[..70_000]).unwrap();
    broken(&path("short.qcow2"), &["cut short", "copy it again"], 1);
    let mut corrupt = bytes.clone();
    corrupt[79] |= 2;
    std::fs::write(path("corrupt.qcow2"), corrupt).unwrap();
    broken(&path("corrupt.qcow2"), &["corrupt", "qemu-img check"], 1);

    let secret = ["--object", "secret,id=s,data=x", "-f", "qcow2"];
    let options = ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"];
    let encrypted = make("encrypted.qcow2", &[&secret[..], &options].concat());
    broken(&encrypted, &["encryption with LUKS", "qemu-img convert"], 1);

    let zstd = make("zstd.qcow2", &["-f", "qcow2", "-o", "compression_type=zstd"]);
    broken(&zstd, &["zstd", "not supported"], 1);

    let unnamed = path("unnamed.qcow2");
    let old = ["create", "-q", "-f", "qcow2", "-u", "-b", text(&plain), text(&unnamed), "4M"];
    // Without the name of the backing file's format; newer versions of qemu-img reject this.
    let made = Command::new("qemu-img").args(old).output().unwrap();
    if made.status.success() {
        broken(&unnamed, &["never detected", "qemu-img rebase"], 1);
    } else {
        let named = path("named.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&plain), text(&named)]);
        let mut bytes = std::fs::read(&named).unwrap();
        let at = bytes.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
        bytes[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
        std::fs::write(&unnamed, bytes).unwrap();
        broken(&unnamed, &["never detected", "qemu-img rebase"], 1);
    }

    // The chain is a loop.
    let (a, b) = (path("a.qcow2"), path("b.qcow2"));
    make("a.qcow2", &["-f", "qcow2"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", text(&a), text(&b)]);
    qemu_img(&["rebase", "-u", "-F", "qcow2", "-b", text(&b), text(&a)]);
    broken(&a, &["depends on the image itself"], 1);

    // A raw image to which a guest wrote a header is still raw; the operator is warned.
    std::fs::copy(&plain, path("guest.img")).unwrap();
    std::fs::File::options().write(true).open(path("guest.img")).unwrap().set_len(1 << 20).unwrap();
    let (out, _, code) = pvio(&[text(&path("guest.img"))]);
    assert_eq!(code, Some(0));
    assert!(out.contains("format    raw") && out.contains("begins like a qcow2 image"), "{out}");
}

#[test]
fn inspect_reports_foreign_formats_and_truncated_files_with_advice() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let source = path("source.img");
    let noise: Vec<u8> =
        (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&source, noise).unwrap();
    let make = |format: &str, name: &str, options: &str| {
        let file = path(name);
        qemu_img(&["convert", "-O", format, "-o", options, text(&source), text(&file)]);
        file
    };
    for (format, name, options) in
        [("vhdx", "a.vhdx", "subformat=dynamic"), ("vdi", "a.vdi", "static=off")]
    {
        let file = make(format, name, options);
        broken(&file, &[format, "not supported", "qemu-img convert"], 2);
        // It can be inspected as raw bytes, with a warning about its format.
        let (out, _, code) = pvio(&[&format!("raw:{}", text(&file))]);
        assert_eq!(code, Some(0));
        assert!(out.contains(&format!("begins like a {format} image")), "{out}");
    }
    let luks = path("a.luks");
    let secret = ["--object", "secret,id=s,data=x", "-o", "key-secret=s,iter-time=10"];
    qemu_img(&[&["create", "-q", "-f", "luks"], &secret[..], &[text(&luks), "4M"]].concat());
    broken(&luks, &["luks", "not supported"], 2);

    let cut = |file: &Path, keep: u64| {
        std::fs::File::options().write(true).open(file).unwrap().set_len(keep).unwrap();
    };
    for kind in ["monolithicSparse", "streamOptimized"] {
        let file = make("vmdk", "sparse.vmdk", &format!("subformat={kind}"));
        let (out, _, code) = pvio(&[text(&file)]);
        assert_eq!(code, Some(0), "{out}");
        assert!(out.contains(kind) && out.contains("grains of 65536 bytes"), "{out}");
        let len = file.metadata().unwrap().len();
        // Compressed, the last part of the file is not used.
        let little = if kind == "monolithicSparse" { 512 } else { 65_536 };
        for keep in [len - little, len - 65_536, len / 2, len / 8, 600] {
            cut(&file, keep);
            broken(&file, &["cut short", "copy it again"], 1);
        }
    }
    for (format, name, options) in [
        ("qcow2", "a.qcow2", "compat=1.1"),
        ("qcow2", "old.qcow2", "compat=0.10"),
        ("vpc", "dynamic.vhd", "subformat=dynamic"),
        ("vpc", "fixed.vhd", "subformat=fixed"),
    ] {
        let file = make(format, name, options);
        let len = file.metadata().unwrap().len();
        assert_eq!(pvio(&[text(&file)]).2, Some(0), "{name} is whole");
        for keep in [len - 65_536, len / 2, len / 8, 600] {
            cut(&file, keep);
            broken(&file, &["cut short", "copy it again"], 1);
        }
    }
    let flat = make("vmdk", "flat.vmdk", "subformat=monolithicFlat");
    assert_eq!(pvio(&[text(&flat)]).2, Some(0));
    let extent = path("flat-flat.vmdk");
    cut(&extent, 1 << 20);
    broken(&flat, &["flat-flat.vmdk", "cut short", "needs 4194304 bytes"], 1);
    std::fs::remove_file(&extent).unwrap();
    broken(&flat, &["refers to flat-flat.vmdk", "does not exist"], 1);
}

#[test]
fn inspect_shows_lock_state_of_image() {
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", text(&path), "4M"]);
    let state = || {
        let (out, ..) = pvio(&["--json", text(&path)]);
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        json["files"][0]["lock"].as_str().unwrap().to_owned()
    };
    assert_eq!(state(), "free");
    for (args, lock) in [(&["-r"][..], "read"), (&[], "written")] {
        let mut qemu = Command::new("qemu-io")
            .args(args)
            .args(["-f", "qcow2", text(&path)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::Write::write_all(qemu.stdin.as_mut().unwrap(), b"read 0 512\n").unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(qemu.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        assert_eq!(state(), lock);
        drop(qemu.stdin.take());
        qemu.wait().unwrap();
    }
    assert_eq!(state(), "free");
}

/// Paths are byte strings everywhere: command line, xenstore, driver domain.
#[test]
fn inspect_and_check_accept_non_utf8_paths_and_image_root_option() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |bytes: &[u8]| dir.path().join(OsStr::from_bytes(bytes));
    let pvio = |args: &[&OsStr]| {
        let Output { stdout, stderr, status } =
            Command::new(env!("CARGO_BIN_EXE_pvio")).args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        (text(stdout), text(stderr), status.code())
    };
    let (roots, own) = (path(b"r\xff,1]"), path(b"own"));
    std::fs::create_dir(&roots).unwrap();
    std::fs::create_dir(&own).unwrap();
    let base = roots.join(OsStr::from_bytes(b"base\xfe.img"));
    std::fs::File::create(&base).unwrap().set_len(1 << 20).unwrap();
    let image = own.join(OsStr::from_bytes(b"a\xfd.qcow2"));
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&base).arg(&image);
    assert!(create.status().unwrap().success());

    let (_, err, code) = pvio(&["inspect".as_ref(), image.as_os_str()]);
    assert_eq!(code, Some(1));
    assert!(err.contains("\nhelp: if") && err.contains("--image-root"), "{err}");
    let root = ["--image-root".as_ref(), roots.as_os_str()];
    for json in [&[][..], &["--json".as_ref()]] {
        let (out, err, code) =
            pvio(&[&["inspect".as_ref(), image.as_os_str()], &root[..], json].concat());
        assert_eq!((err.as_str(), code), ("", Some(0)), "{out}");
        // JSON escapes the backslash again.
        assert!(out.replace("\\\\", "\\").contains("base\\xfe.img"), "{out}");
    }
    // Through all components, with the image root in the disk's own options.
    let check = ["check", "--requests", "50", "--disk"].map(OsStr::new);
    let (_, err, code) = pvio(&[&check[..], &[image.as_os_str()]].concat());
    assert_eq!(code, Some(2), "{err}");
    assert!(err.contains("below no image root"), "{err}");
    let (out, err, code) = pvio(&[&check[..], &[image.as_os_str()], &root].concat());
    assert_eq!(code, Some(0), "{out}{err}");
    assert!(out.contains("50"), "{out}");
    assert!(std::fs::read(&base).unwrap().iter().all(|byte| *byte == 0), "only the top is written");

    let (_, err, code) = pvio(&["inspect", "--image-root", "/none", "/dev/null"].map(OsStr::new));
    assert_eq!(code, Some(2));
    assert!(err.contains("/none is not a directory"), "{err}");
}

#[test]
fn inspect_shows_non_utf8_path_escaped_and_in_hex() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let dir = tempfile::tempdir().unwrap();
    let name = b"a\xff\\ b.img";
    let path = dir.path().join(OsStr::from_bytes(name));
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let inspect = |options: &[&str], path: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pvio"));
        let out = command.arg("inspect").args(options).arg(path).output().unwrap();
        (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap())
    };
    let (out, err) = inspect(&[], &path);
    let shown = format!("{}/a\\xff\\\\ b.img", text(dir.path()));
    assert!(out.lines().any(|line| line == format!("file        {shown}")), "{out}{err}");
    let (out, _) = inspect(&["--json"], &path);
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let file = &found["files"][0];
    assert_eq!(
        (&file["path"], &file["path_hex"]),
        (&shown.clone().into(), &hex(path.as_os_str().as_bytes()).into())
    );
    assert_eq!(found["disk_hex"], hex(&[b"raw:", path.as_os_str().as_bytes()].concat()));
    // A name in UTF-8 is not escaped and has no hexadecimal key.
    let plain = dir.path().join("a\\xff.img");
    std::fs::write(&plain, vec![0; 1 << 20]).unwrap();
    let (out, _) = inspect(&["--json"], &plain);
    let found: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(
        (&found["files"][0]["path"], &found["files"][0]["path_hex"]),
        (&text(&plain).into(), &serde_json::Value::Null)
    );
    // Names in errors are escaped as well.
    let (_, err) = inspect(&[], &dir.path().join(OsStr::from_bytes(b"\xfe")));
    assert!(err.contains("/\\xfe does not exist"), "{err}");
}
