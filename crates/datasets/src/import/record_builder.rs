//! Builds the record file from draft records, in the same way for all formats: class filter, images, boxes, splits, leaks.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::json;
use unveil_core::{BBox, Record, Task};
use unveil_data::image_folder::ImageFolder;

use super::box_placement::place_box;
use super::draft::{DraftRecord, Object, ParsedDataset};
use super::images::{ImageInfo, decode_images, link_image};
use super::leaks::{BuiltRecord, find_leaks, find_split_patients};
use super::report::{ImportReport, LeftOut};
use super::split::assign_split;
use super::{Format, ImportError, ImportOptions};

/// Checks the drafts of `dataset`, assigns splits, and writes the record file `out`.
pub(super) fn build_records(
    mut dataset: ParsedDataset,
    format: Format,
    out: &Path,
    options: &ImportOptions,
) -> Result<ImportReport, ImportError> {
    require_objects(&dataset)?;
    let all_classes: BTreeSet<String> =
        dataset.items.iter().flat_map(|i| &i.objects).map(|o| o.label.clone()).collect();
    // If splits are known in advance, images of other splits are not decoded; leaks are then searched among the imported records only.
    if let Some(split) = options.split.as_ref().filter(|_| !options.drop_leaks) {
        dataset.items.retain(|i| known_split(i, dataset.strict, options).is_none_or(|s| s == split));
    }
    for o in dataset.items.iter().flat_map(|i| &i.objects).filter(|o| !o.label.trim().is_empty()) {
        *dataset.report.classes.entry(o.label.clone()).or_default() += 1;
    }
    leave_out_non_utf8_paths(&mut dataset);
    let (decoded, mut unread) = decode_images(&dataset.items);
    if let Some((_, error)) = unread.pop_first().filter(|_| dataset.strict) {
        return Err(error.into());
    }
    let folder = || dataset.source.root.canonicalize().ok()?.file_name().map(|n| n.to_string_lossy().into_owned());
    let source = Some(format).filter(|f| f.is_generic()).and_then(|_| folder());
    let mut builder = RecordBuilder {
        question: default_question(&dataset, options, &all_classes)?,
        source: source.unwrap_or_else(|| format.name().to_owned()),
        options,
        ids: HashMap::new(),
    };
    let io = |(path, cause)| ImportError::Io { path, cause };
    let mut images = ImageFolder::new(&dataset.source.root, out).map_err(io)?;
    if let Some(other) = &dataset.source.images {
        images.add_source(other);
    }
    let mut records = Vec::with_capacity(dataset.items.len());
    for item in std::mem::take(&mut dataset.items) {
        match decoded.get(&item.image) {
            Some(info) => records.extend(builder.build(item, *info, &mut dataset)),
            None => {
                let name = item.image.display().to_string();
                dataset.leave_out(&item.file, item.row, &name, "its image cannot be read");
            }
        }
    }
    dataset.report.leaks = find_leaks(&records);
    dataset.report.split_patients = find_split_patients(&records);
    if options.drop_leaks {
        let copies: BTreeSet<String> = dataset.report.leaks.iter().map(|l| l.copy.clone()).collect();
        let (copies, rest): (Vec<_>, Vec<_>) = records.into_iter().partition(|built| copies.contains(&built.record.id));
        for built in copies {
            dataset.leave_out(
                &built.origin.file,
                built.origin.row,
                &built.record.id,
                "its image is also in another split",
            );
        }
        records = rest;
    }
    if let Some(split) = &options.split {
        records.retain(|built| built.record.split == *split);
    }
    let mut list = Vec::with_capacity(records.len());
    for built in records {
        let image = link_image(&mut images, &built.origin.image, built.origin.window)?;
        dataset.report.objects += built.origin.objects;
        dataset.report.boxes += built.record.boxes.len();
        *dataset.report.splits.entry(built.record.split.clone()).or_default() += 1;
        list.push(Record { image, ..built.record });
    }
    if list.is_empty() {
        return Err(no_records_error(&dataset, options));
    }
    unveil_data::records::write(out, &list)?;
    dataset.report.records = list.len();
    dataset.report.images_copied_to = images.copies();
    Ok(dataset.report)
}

/// Source of a record: annotation, image, and number of annotated objects.
struct Origin {
    file: PathBuf,
    row: usize,
    image: PathBuf,
    window: Option<(f32, f32)>,
    objects: usize,
}

/// Returns the split of a draft unless it depends on the image's pixels. In strict data sets, images that no list names have no split.
fn known_split<'a>(item: &'a DraftRecord, strict: bool, options: &ImportOptions) -> Option<&'a str> {
    if !options.resplit && (strict || !item.split.is_empty()) {
        return Some(&item.split);
    }
    Some(&item.patient).filter(|p| !p.is_empty()).map(|p| assign_split(p.as_bytes()))
}

/// Fails if no draft has an object or a question: every image would become "no finding".
fn require_objects(dataset: &ParsedDataset) -> Result<(), ImportError> {
    let says = |i: &DraftRecord| i.text_only || !(i.objects.is_empty() && i.unread.is_empty() && i.dropped.is_empty());
    if dataset.items.is_empty() || dataset.items.iter().any(says) {
        return Ok(());
    }
    let what =
        "the data set has no object: every image would become \"no finding\"; is this the folder of the annotations?";
    Err(dataset.source.dataset_error(what))
}

/// Leaves out images whose path is not UTF-8: a record, which is UTF-8, cannot name them.
fn leave_out_non_utf8_paths(dataset: &mut ParsedDataset) {
    for item in std::mem::take(&mut dataset.items) {
        let roots = [Some(&dataset.source.root), dataset.source.images.as_ref()];
        let below = roots.into_iter().flatten().find_map(|r| item.image.strip_prefix(r).ok()).unwrap_or(&item.image);
        match below.to_str() {
            Some(_) => dataset.items.push(item),
            None => {
                let name = below.display().to_string();
                dataset.leave_out(&item.file, item.row, &name, "its image's path is not UTF-8 (rename the file)");
            }
        }
    }
}

/// Returns the question for images without one.
fn default_question(
    dataset: &ParsedDataset,
    options: &ImportOptions,
    all: &BTreeSet<String>,
) -> Result<String, ImportError> {
    let classes = &dataset.report.classes;
    let words = match &options.class {
        Some(f) if !classes.contains_key(&f.class) => {
            let known: Vec<&str> = classes.keys().map(String::as_str).collect();
            let what = format!("no object of class \"{}\"; the classes are {}", f.class, known.join(", "));
            return Err(dataset.source.dataset_error(what));
        }
        Some(f) => f.category.clone(),
        // A split without an object is asked for all classes of the data set.
        None if classes.is_empty() => all.iter().cloned().collect::<Vec<_>>().join(", "),
        None => classes.keys().cloned().collect::<Vec<_>>().join(", "),
    };
    let dataset_question = dataset.question.filter(|_| options.class.is_none()).map(str::to_owned);
    Ok(options.question.clone().or(dataset_question).unwrap_or_else(|| format!("Where is the {words}?")))
}

/// Builds the records of one import: shared values, and the ids already used.
struct RecordBuilder<'a> {
    question: String,
    source: String,
    options: &'a ImportOptions,
    ids: HashMap<String, usize>,
}

impl RecordBuilder<'_> {
    /// Builds one record; `None` if an object could not be read or named or no box remained, because that is not "no finding".
    fn build(
        &mut self,
        item: DraftRecord,
        image_info: ImageInfo,
        dataset: &mut ParsedDataset,
    ) -> Option<BuiltRecord<Origin>> {
        let file = item.file.display().to_string();
        if item.frame.is_some_and(|f| f != image_info.size) {
            dataset.report.size_mismatch.push(file.clone());
        }
        // An object of unknown class may belong to the class that is asked for.
        let asked = |class: &String| self.options.class.as_ref().is_none_or(|f| class.is_empty() || f.class == *class);
        let unnamed = |o: &&Object| o.label.trim().is_empty();
        for (object, _) in item.objects.iter().enumerate().filter(|(_, o)| unnamed(o)) {
            dataset.leave_out(&item.file, object, "", "has no class");
        }
        if item.unread.iter().any(asked) || item.objects.iter().any(|o| unnamed(&o)) {
            dataset.leave_out(&item.file, item.row, &item.id, "one of its objects could not be read or named");
            return None;
        }
        if item.question.is_some() && !item.objects.is_empty() && !item.objects.iter().any(|o| asked(&o.label)) {
            dataset.leave_out(&item.file, item.row, &item.id, "its question is about other classes");
            return None;
        }
        let mut boxes = Vec::<BBox>::new();
        let mut labels = Vec::new();
        let mut rejected = item.dropped.iter().filter(|c| asked(c)).count();
        for (object, o) in item.objects.iter().enumerate() {
            let label = match &self.options.class {
                Some(f) if f.class != o.label => continue,
                Some(f) => f.category.clone(),
                None => o.label.clone(),
            };
            match place_box(o.coords, item.frame, image_info.size, dataset.strict) {
                Ok(placed) => {
                    dataset.report.clipped += usize::from(placed.clipped);
                    dataset.report.scaled += usize::from(placed.scaled);
                    boxes.push(placed.bbox);
                    labels.push(label);
                }
                Err(reason) => {
                    rejected += 1;
                    let label = o.label.clone();
                    let coords = Some(o.coords.numbers());
                    dataset.report.leave_out(LeftOut { file: file.clone(), object, label, reason, coords });
                }
            }
        }
        if boxes.is_empty() && rejected > 0 {
            dataset.leave_out(&item.file, item.row, &item.id, "all its boxes were left out");
            return None;
        }
        let category = match &self.options.class {
            Some(f) => f.category.clone(),
            None => {
                labels.iter().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
            }
        };
        let split = known_split(&item, dataset.strict, self.options);
        let split = split.unwrap_or_else(|| assign_split(image_info.pixels.as_bytes())).to_owned();
        let mut extra = item.extra;
        if !item.patient.is_empty() {
            extra.insert("patient".to_owned(), json!(item.patient));
        }
        let task = self.options.task.as_ref().unwrap_or(&item.suite_task);
        if !task.is_empty() {
            extra.insert("suite_task".to_owned(), json!(task));
        }
        let (width, height) = image_info.size;
        let record = Record {
            id: self.unique_id(item.id),
            image: String::new(),
            image_size: Some([width, height]),
            question: item.question.unwrap_or_else(|| self.question.clone()),
            answer: item.answer,
            category,
            boxes,
            labels,
            modality: self.options.modality.clone().unwrap_or(item.modality),
            source: self.source.clone(),
            split,
            task: if item.text_only { Task::Vqa } else { Task::Grounding },
            extra,
        };
        let file = item.file;
        let row = item.row;
        let image = item.image;
        let window = item.window;
        let origin = Origin { file, row, image, window, objects: item.objects.len() };
        Some(BuiltRecord { record, patient: item.patient, image: image_info, origin })
    }

    /// Returns `id`, or `id` with the first free number from 2 on.
    fn unique_id(&mut self, id: String) -> String {
        let id = if id.trim().is_empty() { "record".to_owned() } else { id };
        let mut name = id.clone();
        while self.ids.contains_key(&name) {
            let n = self.ids.entry(id.clone()).or_insert(1);
            *n += 1;
            name = format!("{id}-{n}");
        }
        self.ids.insert(name.clone(), 1);
        name
    }
}

fn no_records_error(dataset: &ParsedDataset, options: &ImportOptions) -> ImportError {
    let reasons: Vec<String> = dataset.report.left_out_by_reason.iter().map(|(r, n)| format!("{n}: {r}")).collect();
    let left = if reasons.is_empty() { String::new() } else { format!("; left out: {}", reasons.join("; ")) };
    let what = match &options.split {
        Some(split) => format!("no record in split \"{split}\" (splits are train, val, test){left}"),
        None => format!("no record is left{left}"),
    };
    dataset.source.dataset_error(what)
}
