//! Records, prepared groups without an image, and rewards.

use std::collections::BTreeMap;

use unveil_core::{Breakdown, Component, Grid, GroupInput, MaskReason, Prompt, Record};

/// Returns a record of an image of 64 x 64 pixels with one box.
pub fn record(id: &str) -> Record {
    let fields = serde_json::json!({
        "id": id, "image": "i.png", "image_size": [64, 64], "question": "q", "category": "x", "boxes": [[0.0, 0.0, 16.0, 16.0]],
    });
    serde_json::from_value(fields).expect("a valid record")
}

/// Returns a prompt of two tokens without an image.
pub fn text_input(id: &str, index: usize) -> GroupInput {
    GroupInput {
        record: record(id),
        image_size: (64, 64),
        prompt: Prompt { tokens: vec![1, index as u32], grids: vec![] },
        patches: vec![],
        merged: Grid { rows: 2, cols: 2 },
        encoded: Default::default(),
    }
}

/// Returns a breakdown with one component: `total`, or masked if `None`.
pub fn breakdown(id: &str, index: usize, total: Option<f64>) -> Breakdown {
    let component = total.map_or_else(|| Component::masked(MaskReason::NoAttention), Component::value);
    Breakdown { id: id.into(), index, total, components: BTreeMap::from([("toy".into(), component)]) }
}

/// Returns the share of tokens below 16, a toy reward.
pub fn low_tokens(tokens: &[u32]) -> Option<f64> {
    Some(tokens.iter().filter(|t| **t < 16).count() as f64 / tokens.len().max(1) as f64)
}
