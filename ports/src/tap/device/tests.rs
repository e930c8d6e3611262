use super::*;

#[test]
fn tap_with_invalid_name_is_rejected() {
    for good in ["vif7.0", "a", "fifteen-bytes-x"] {
        assert_eq!(check_name(good), Ok(()), "{good}");
    }
    for bad in ["", ".", "..", "sixteen-bytes-xx", "a/b", "a b", "vif%d", "é", "a\0b", "a:1"] {
        assert!(matches!(Tap::create(&TapConfig::new(bad)), Err(TapError::BadName(_))));
    }
}

#[test]
fn ifreq_has_size_of_kernel_struct_and_terminated_name() {
    assert_eq!(size_of::<IfReq>(), 40);
    assert_eq!(IfReq::new("a-name-that-is-too-long").name[15], 0);
}
