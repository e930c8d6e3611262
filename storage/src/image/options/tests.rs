use super::*;
use alloc::format;
use alloc::string::ToString;
use pvio_ring::error::Remedy;

const ALL: &str = "ro,direct,overlay=on,sector=4096,physical=4096,discard=off,io=sqpoll,\
                   policy=map,answers=as-done,queues=2,ring-order=3,indirect=64,iops=100/200,\
                   bps=1048576/104857,read-iops=none,read-bps=1/1,write-iops=5/9,\
                   write-bps=7/8,group=g,latency=5ms,jitter=0,fail-reads=1,\
                   fail-writes=2,fail-flushes=3,errno=28,seed=9,on-full=error,trace=/t,image-root=/r,\
                   image-root=/s,write-extents=any,busy-timeout=9s,trusted=off,removable=on,\
                   cdrom=off";

#[test]
fn options_with_every_key_round_trip_and_split_into_live_and_fixed() {
    let options: DiskOptions = ALL.parse().unwrap();
    assert_eq!(options.to_string(), ALL);
    for (key, ..) in KEYS {
        let other = matches!(key, "rw" | "buffered");
        let there = ALL.split(',').any(|word| word.split('=').next() == Some(key));
        assert_eq!(there, !other, "{key}");
    }
    let other: DiskOptions = "rw,buffered".parse().unwrap();
    assert_eq!((other.read_only, other.direct), (Some(false), Some(false)));
    assert_eq!("".parse(), Ok(DiskOptions::default()));
    assert_eq!(options.live().or(options.fixed()), options);
    let live = "iops=100/200,bps=1048576/104857,read-iops=none,read-bps=1/1,write-iops=5/9,\
                write-bps=7/8,latency=5ms,jitter=0,fail-reads=1,fail-writes=2,\
                fail-flushes=3,errno=28,on-full=error";
    assert_eq!(options.live().to_string(), live);
    assert_eq!(options.fixed().live(), DiskOptions::default());
}

#[test]
fn disk_options_override_defaults() {
    let usual: DiskOptions = "iops=5,group=all,ro".parse().unwrap();
    let own: DiskOptions = "iops=none,rw".parse().unwrap();
    let both = own.or(usual);
    assert_eq!((both.limits(), both.read_only), (ThrottleLimits::default(), Some(false)));
    assert_eq!(both.group.as_deref(), Some("all"));
    for io in [IoMode::Normal, IoMode::SqPoll, IoMode::IoPoll] {
        let said: DiskOptions = format!("io={}", io.word()).parse().unwrap();
        assert_eq!((said.io, said.to_string()), (Some(io), format!("io={}", io.word())));
    }
    let config = "policy=copy,queues=2".parse::<DiskOptions>().unwrap();
    let config = config.config(Config::default());
    assert_eq!((config.policy, config.max_queues), (Policy::Copy, 2));
}

#[test]
fn rate_and_duration_options_parse_to_limits_and_faults() {
    let options: DiskOptions = "iops=100,bps=1M/2M,latency=3ms,jitter=1s".parse().unwrap();
    let limits = options.limits();
    assert_eq!(limits.all.operations, Some(BucketRate::per_second(100, 10)));
    assert_eq!(limits.all.bytes, Some(BucketRate::per_second(1 << 20, 2 << 20)));
    let faults = options.faults();
    assert_eq!(faults.latency, Duration::from_millis(3));
    assert_eq!((faults.jitter, faults.errno), (Duration::from_secs(1), 5));
}

#[test]
fn invalid_option_is_rejected_with_advice() {
    for bad in [
        "iops",
        "iops=",
        "iops=0",
        "iops=1/0",
        "iops=-1",
        "iops=x",
        "bps=1Q",
        "sector=1024",
        "physical=1000",
        "physical=131072",
        "queues=0",
        "queues=257",
        "ring-order=6",
        "indirect=4097",
        "latency=5",
        "latency=2h",
        "latency=3601s",
        "errno=0",
        "errno=4096",
        "fail-reads=1000001",
        "discard=maybe",
        "policy=persistent",
        "io=aio",
        "answers=any",
        "group=",
        "trace=",
        "trace=/a%zz",
        "image-root",
        "image-root=",
        "write-extents=all",
        "ro=1",
        "direct=yes",
        "wat",
        "iops=99999999999999999999",
        "bps=99999999999T",
        "latency=99999999999999999999ns",
    ] {
        let error = bad.parse::<DiskOptions>().expect_err(bad);
        assert!(error.remedy().is_some(), "{error}: has no remedy");
        assert!(!error.to_string().contains("; "), "{error}");
    }
}

#[test]
fn path_options_are_bytes_and_round_trip_any_character() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let path = |bytes: &[u8]| PathBuf::from(OsStr::from_bytes(bytes));
    let options = DiskOptions::from_bytes(b"trace=/a\xff b,image-root=/%2c%5D%25%80,ro").unwrap();
    assert_eq!(options.trace, Some(path(b"/a\xff b")));
    assert_eq!(options.image_roots, Some(std::vec![path(b"/,]%\x80")]));
    let all: Vec<u8> = (1..=255).collect();
    let options = DiskOptions { trace: Some(path(&all)), ..options };
    assert_eq!(options.to_string().parse(), Ok(options.clone()), "{options}");
    // All other options must be UTF-8.
    for bad in [&b"group=\xff"[..], b"\xff=1", b"iops=\xff"] {
        assert!(DiskOptions::from_bytes(bad).is_err());
    }
}

#[cfg(feature = "serde")]
#[test]
fn options_and_disks_sent_as_json_arrive_unchanged() {
    use crate::image::Disk;
    let options: DiskOptions = ALL.parse().unwrap();
    let text = serde_json::to_string(&options).unwrap();
    assert_eq!(serde_json::from_str::<DiskOptions>(&text).unwrap(), options, "{text}");
    assert!(serde_json::from_str::<DiskOptions>("\"iops=x\"").is_err());
    for named in [&b"qcow2@first:/srv/\xff a.img"[..], b"nbd://server:10809/x", b"ram:1M", b"./[x"]
    {
        let disk = Disk { options: options.clone(), ..Disk::from_bytes(named).unwrap() };
        let text = serde_json::to_string(&disk).unwrap();
        assert_eq!(serde_json::from_str::<Disk>(&text).unwrap(), disk, "{text}");
    }
}
