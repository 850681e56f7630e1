//! TBX11K (<https://mmcheng.net/tb/>; Liu et al., CVPR 2020): `annotations/json/TBX11K_{train,val}.json` in COCO's form, images in
//! `imgs/{health,sick,tb}/`, lists in `lists/TBX11K_{train,val}.txt`.
//!
//! The lists, where they are there, decide about the split; an image in both is an error. Healthy images become records without a box.
//! Left out: `sick` images (ill without tuberculosis: neither a box nor nothing), `tb` images without a box (one is known,
//! `tb/tb1199.png`), the test images (their annotations are not published), `extra/` (other data sets).

use std::collections::BTreeMap;
use std::path::Path;

use super::ImportError;
use super::coco;
use super::item::Found;

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    found.question = Some("Is there tuberculosis, and where?");
    let root = found.source.root.clone();
    let mut lists: BTreeMap<String, &str> = BTreeMap::new();
    for split in ["train", "val"] {
        let list = root.join(format!("lists/TBX11K_{split}.txt"));
        if !list.is_file() {
            continue;
        }
        for line in found.source.text(&list)?.lines().map(str::trim).filter(|l| !l.is_empty()) {
            let name = line.trim_start_matches("imgs/").to_owned();
            if let Some(other) = lists.insert(name, split).filter(|other| *other != split) {
                return Err(found
                    .source
                    .wrong(format!("{line} is in both lists/TBX11K_{other}.txt and TBX11K_{split}.txt")));
            }
        }
    }
    for split in ["train", "val"] {
        let file = root.join(format!("annotations/json/TBX11K_{split}.json"));
        if file.is_file() {
            coco::read_file(found, &file, &["imgs"], split)?;
        }
    }
    if found.items.is_empty() {
        return Err(found.source.wrong("no image of annotations/json/TBX11K_train.json or TBX11K_val.json is here"));
    }
    for mut item in std::mem::take(&mut found.items) {
        let below = item.image.strip_prefix(root.join("imgs")).unwrap_or(Path::new("")).to_string_lossy().into_owned();
        let reason = if below.starts_with("sick/") {
            Some("is sick without tuberculosis")
        } else if below.starts_with("extra/") {
            Some("belongs to another data set")
        } else if item.objects.is_empty() && !below.starts_with("health/") {
            Some("has tuberculosis but no box")
        } else if !lists.is_empty() && !lists.contains_key(&below) {
            Some("is in no list")
        } else {
            None
        };
        if let Some(reason) = reason {
            found.leave_out(&item.file, item.row, &below, reason);
            continue;
        }
        if let Some(split) = lists.get(&below) {
            item.split = (*split).to_owned();
        }
        item.modality = "X-ray".to_owned();
        let labels = item.objects.iter_mut().map(|o| &mut o.label);
        for label in labels.chain(&mut item.unread).chain(&mut item.dropped) {
            *label = match label.as_str() {
                "ActiveTuberculosis" => "active tuberculosis".to_owned(),
                "ObsoletePulmonaryTuberculosis" => "latent tuberculosis".to_owned(),
                "PulmonaryTuberculosis" => "tuberculosis".to_owned(),
                _ => continue,
            };
        }
        found.items.push(item);
    }
    Ok(())
}
