//! Files of value heads.

use tch::{Device, Kind, Tensor};
use unveil_model::ValueHead;

#[test]
fn heads_are_read_as_written() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let options = (Kind::Float, Device::Cpu);
    assert!(ValueHead::load(dir.path(), 4, options).expect("none").is_none());
    let mut head = ValueHead::new(4, options);
    let named = vec![
        ("value_head.weight".to_owned(), Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]).view([1, 4])),
        ("value_head.bias".to_owned(), Tensor::from_slice(&[0.5f32])),
    ];
    head.load_state(&named).expect("fits");
    head.save(dir.path()).expect("saves");
    let loaded = ValueHead::load(dir.path(), 4, options).expect("loads").expect("is there");
    assert_eq!(loaded.forward(&Tensor::ones([1, 4], options)).double_value(&[0]), 10.5);
    let wrong = ValueHead::load(dir.path(), 5, options).expect_err("misshapen").to_string();
    assert!(wrong.contains("value_head.weight") && wrong.contains("[1, 4]"), "{wrong}");
    let missing = head.load_state(&named[..1]).unwrap_err().to_string();
    assert!(missing.contains("value_head.bias"), "{missing}");
}
