//! TBX11K (<https://mmcheng.net/tb/>; Liu et al., CVPR 2020), tuberculosis in chest X-rays.
//!
//! Files: `annotations/json/TBX11K_{train,val}.json` in the COCO format, images in `imgs/{health,sick,tb}/`, and optional lists
//! `lists/TBX11K_{train,val}.txt`, which then decide the split; an image in both lists is an error.
//!
//! Fields: those of COCO; the labels become "active tuberculosis", "latent tuberculosis" and "tuberculosis". Healthy images become records
//! without a box.
//!
//! Left out: `sick` images (ill without tuberculosis: neither a box nor "no finding"), `tb` images without a box (one is known,
//! `tb/tb1199.png`), the test images (their annotations are not published), and `extra/` (other data sets).

use std::collections::BTreeMap;
use std::path::Path;

use super::ImportError;
use super::coco;
use super::draft::ParsedDataset;

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    dataset.question = Some("Is there tuberculosis, and where?");
    let root = dataset.source.root.clone();
    let mut lists: BTreeMap<String, &str> = BTreeMap::new();
    for split in ["train", "val"] {
        let list = root.join(format!("lists/TBX11K_{split}.txt"));
        if !list.is_file() {
            continue;
        }
        for line in dataset.source.read_text(&list)?.lines().map(str::trim).filter(|l| !l.is_empty()) {
            let listed = line.trim_start_matches("imgs/").to_owned();
            if let Some(other) = lists.insert(listed, split).filter(|other| *other != split) {
                return Err(dataset
                    .source
                    .dataset_error(format!("{line} is in both lists/TBX11K_{other}.txt and TBX11K_{split}.txt")));
            }
        }
    }
    for split in ["train", "val"] {
        let file = root.join(format!("annotations/json/TBX11K_{split}.json"));
        if file.is_file() {
            coco::read_file(dataset, &file, &["imgs"], split)?;
        }
    }
    if dataset.items.is_empty() {
        return Err(dataset
            .source
            .dataset_error("no image of annotations/json/TBX11K_train.json or TBX11K_val.json exists"));
    }
    for mut item in std::mem::take(&mut dataset.items) {
        let name = item.image.strip_prefix(root.join("imgs")).unwrap_or(Path::new("")).to_string_lossy().into_owned();
        let reason = if name.starts_with("sick/") {
            Some("is sick without tuberculosis")
        } else if name.starts_with("extra/") {
            Some("belongs to another data set")
        } else if item.objects.is_empty() && !name.starts_with("health/") {
            Some("has tuberculosis but no box")
        } else if !lists.is_empty() && !lists.contains_key(&name) {
            Some("is in no list")
        } else {
            None
        };
        if let Some(reason) = reason {
            dataset.leave_out(&item.file, item.row, &name, reason);
            continue;
        }
        if let Some(split) = lists.get(&name) {
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
        dataset.items.push(item);
    }
    Ok(())
}
