//! Records for the tests of this crate, and a switch that stalls engines.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use unveil_core::Record;
use unveil_data::image_store::Image;

/// Directories of the models whose engines are stalled.
pub(crate) static STALLED: LazyLock<Mutex<HashSet<PathBuf>>> = LazyLock::new(Mutex::default);

/// Waits while the engine of this model is stalled.
pub(crate) fn wait_while_stalled(model: &Path) {
    while STALLED.lock().unwrap().contains(model) {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Returns a picture with a bright rectangle, different for each `k`.
pub(crate) fn picture(k: u32) -> Image {
    let mut image = Image::new(96, 96);
    for y in 0..96 {
        for x in 0..96 {
            let inside = (20 + k..50).contains(&x) && (30..60).contains(&y);
            image.set_pixel(x, y, [if inside { 220 } else { ((x * (k + 1) + y) % 90) as u8 }; 3]);
        }
    }
    image
}

/// Returns the record of picture `k`.
pub(crate) fn record(k: u32) -> Record {
    let v = serde_json::json!({"id": format!("r{k}"), "image": format!("r{k}.png"), "question": "What is abnormal, and where?",
        "category": "nodule", "boxes": [[20 + k, 30, 50, 60]]});
    serde_json::from_value(v).unwrap()
}
