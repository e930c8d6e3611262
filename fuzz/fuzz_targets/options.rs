//! Options and names as operators and toolstacks write them: disks, NICs, addresses, rates.
//!
//! What is parsed is written in a form that is parsed to the same.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use pvio_blkback::Policy;
use pvio_ports::options::{NicOptions, shared_rate};
use pvio_ports::wrappers::guard::Network;
use pvio_storage::image::options::KEYS;
use pvio_storage::image::{Disk, DiskOptions, Format};
use pvio_xenbus::handshake::vif::Mac;

#[derive(Arbitrary, Debug)]
enum Text {
    Disk(Vec<u8>),
    DiskWithFormat(Vec<u8>, Vec<u8>),
    /// Options of a disk, by their keys, and its storage.
    DiskOptions(Vec<(u8, String)>, Vec<u8>),
    Nic(String),
    NicOptions(Vec<(u8, String)>),
    Address(String),
    Rate(String),
    Word(String),
}

const NIC_KEYS: [&str; 22] = [
    "bridge", "tap", "afxdp", "switch", "netns", "loopback", "record", "replay", "guard", "tx",
    "rx", "txpps", "rxpps", "share", "loss", "repeat", "reorder", "corrupt", "delay", "jitter",
    "seed", "",
];

fuzz_target!(|text: Text| match text {
    Text::Disk(text) => disk(Disk::from_bytes(&text).ok()),
    Text::DiskWithFormat(format, rest) => disk(Disk::with_format(&format, &rest).ok()),
    Text::DiskOptions(options, rest) => {
        let key = |at: u8| KEYS[usize::from(at) % KEYS.len()].0;
        let words: Vec<_> =
            options.iter().map(|(at, value)| format!("{}={value}", key(*at))).collect();
        let text = [format!("[{}]", words.join(",")).as_bytes(), &rest].concat();
        disk(Disk::from_bytes(&text).ok());
        if let Ok(options) = DiskOptions::from_bytes(words.join(",").as_bytes()) {
            let _ = (options.limits(), options.faults(), options.live(), options.fixed());
        }
    }
    Text::Nic(words) => drop(NicOptions::default().and(&words)),
    Text::NicOptions(options) => {
        let key = |at: u8| NIC_KEYS[usize::from(at) % NIC_KEYS.len()];
        let words: Vec<_> =
            options.iter().map(|(at, value)| format!("{}={value}", key(*at))).collect();
        let _ = NicOptions::default().and(&words.join(","));
    }
    Text::Address(text) => {
        if let Ok(network) = text.parse::<Network>() {
            assert!(network.has(network.address), "{text} does not contain itself");
        }
        if let Ok(mac) = text.parse::<Mac>() {
            assert_eq!(mac.to_string().parse(), Ok(mac), "{text}");
        }
    }
    Text::Rate(text) => drop(shared_rate(&text)),
    Text::Word(text) => {
        let _ = (Format::from_word(&text), text.parse::<Policy>());
    }
});

fn disk(disk: Option<Disk>) {
    let Some(disk) = disk else { return };
    let written = disk.to_bytes();
    let again = Disk::from_bytes(&written);
    assert_eq!(again.as_ref(), Ok(&disk), "{:?}", String::from_utf8_lossy(&written));
    let _ = (disk.to_string(), disk.storage_spec().path().map(drop));
}
