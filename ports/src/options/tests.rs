use super::*;
use alloc::string::ToString;

fn parsed(options: &str) -> NicOptions {
    NicOptions::default().and(options).unwrap()
}

#[test]
fn nic_options_parse_and_override_earlier_ones() {
    assert_eq!(parsed(""), NicOptions::default());
    let o = parsed("guard=ip, tx=10M/64k,rx=1G,txpps=500,share=up,switch=lan");
    let bytes = |per_second, burst| Some(BucketRate::per_second(per_second, burst));
    assert_eq!(o.guard, GuardMode::Ip);
    assert_eq!(o.tx.bytes, bytes(10_000_000, 64_000));
    assert_eq!(o.tx.packets, bytes(500, 64));
    assert_eq!(o.rx.bytes, bytes(1_000_000_000, 50_000_000));
    assert_eq!((o.share.as_deref(), &o.link), (Some("up"), &LinkSpec::Switch("lan".into())));
    let o = o.and("tx=none,share=none,guard=off,loss=0.5%,delay=5ms,jitter=200us").unwrap();
    assert_eq!((o.tx.bytes, o.share, o.guard), (None, None, GuardMode::Off));
    assert_eq!((o.faults.lose, o.faults.delay), (5000, Duration::from_millis(5)));
    assert_eq!(o.faults.jitter, Duration::from_micros(200));
    let files = LinkSpec::Files { record: Some("/a".into()), replay: Some("/b".into()) };
    assert_eq!(parsed("record=/a,replay=/b").link, files);
    assert_eq!(parsed("loopback").link, LinkSpec::Loopback);
    assert_eq!(parsed("afxdp=eth1").link, LinkSpec::AfXdp("eth1".into()));
    assert_eq!(parsed("tap=t0").link, LinkSpec::ExistingTap("t0".into()));
}

#[test]
fn invalid_nic_option_is_rejected_naming_it() {
    for bad in [
        "x",
        "guard",
        "guard=yes",
        "tx=0",
        "tx=",
        "tx=-1",
        "tx=1T",
        "tx=1/0",
        "loss=101",
        "loss=nan",
        "delay=5",
        "delay=61s",
        "switch=",
        "afxdp",
        "switch=a/b",
        "record=a",
        "loopback=1",
        "seed=x",
        "tx=99999999999999999999",
        "tx=99999999999G",
        "share=.",
    ] {
        let words = std::format!("guard=mac,{bad},loss=1");
        let error = NicOptions::default().and(&words).unwrap_err();
        assert!(error.to_string().contains(bad), "{bad}: {error}");
    }
}

#[test]
fn percentage_of_faults_is_exact() {
    for millionths in (0..=1_000_000).step_by(7) {
        let text = std::format!("loss={}.{:04}%", millionths / 10_000, millionths % 10_000);
        assert_eq!(parsed(&text).faults.lose, millionths, "{text}");
    }
}

#[test]
fn options_written_as_text_parse_to_the_same_options() {
    for words in [
        "",
        "tap=t0,netns=blue",
        "bridge=br0",
        "afxdp=eth1,guard=mac",
        "switch=lan,guard=ip,share=up",
        "loopback",
        "record=/a/b",
        "replay=/c",
        "record=/a,replay=/b",
        "tx=10M/64k,rx=1G,txpps=500,rxpps=7/1",
        "loss=0.0003,repeat=100,reorder=0.57%,corrupt=33.3333",
        "delay=5ms,jitter=60s,seed=18446744073709551615",
    ] {
        let options = parsed(words);
        let text = options.to_string();
        assert_eq!(parsed(&text), options, "{words}: {text}");
        #[cfg(feature = "serde")]
        {
            let json = serde_json::to_string(&options).unwrap();
            assert_eq!(json, std::format!("\"{text}\""));
            assert_eq!(serde_json::from_str::<NicOptions>(&json).unwrap(), options);
        }
    }
    #[cfg(feature = "serde")]
    assert!(serde_json::from_str::<NicOptions>("\"guard=maybe\"").is_err());
}
