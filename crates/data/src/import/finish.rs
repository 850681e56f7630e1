//! From items to a record file: filter, images, boxes, splits, leaks, in one way for all formats.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use serde_json::json;
use unveil_core::{BBox, Record, Task};

use super::images::{Seen, look, reach};
use super::item::{Found, Item, Object};
use super::leaks::{Judged, leaks, split_patients};
use super::place::place;
use super::report::{ImportReport, LeftOut};
use super::split::assigned;
use super::{Format, ImportError, ImportOptions};
use crate::reach::ImageFolder;
use crate::records;

/// Judges, splits and writes what was found.
pub(super) fn finish(
    mut found: Found,
    format: Format,
    out: &Path,
    options: &ImportOptions,
) -> Result<ImportReport, ImportError> {
    some_object(&found)?;
    let all_classes: BTreeSet<String> = found.items.iter().flat_map(|i| &i.objects).map(|o| o.label.clone()).collect();
    // Where splits are known beforehand, images of others need not be looked at; leaks then are those among what is imported.
    if let Some(split) = options.split.as_ref().filter(|_| !options.drop_leaks) {
        found.items.retain(|i| known_split(i, found.strict, options).is_none_or(|s| s == split));
    }
    for o in found.items.iter().flat_map(|i| &i.objects).filter(|o| !o.label.trim().is_empty()) {
        *found.report.classes.entry(o.label.clone()).or_default() += 1;
    }
    leave_out_unwritable(&mut found);
    let (seen, mut unread) = look(&found.items);
    if let Some((_, error)) = unread.pop_first().filter(|_| found.strict) {
        return Err(error.into());
    }
    let folder = || found.source.root.canonicalize().ok()?.file_name().map(|n| n.to_string_lossy().into_owned());
    let source = Some(format).filter(|f| f.is_generic()).and_then(|_| folder());
    let mut desk = Desk {
        question: question(&found, options, &all_classes)?,
        source: source.unwrap_or_else(|| format.name().to_owned()),
        options,
        ids: HashMap::new(),
    };
    let io = |(path, cause)| ImportError::Io { path, cause };
    let mut images = ImageFolder::new(&found.source.root, out).map_err(io)?;
    if let Some(other) = &found.source.images {
        images.also(other);
    }
    let mut judged = Vec::with_capacity(found.items.len());
    for item in std::mem::take(&mut found.items) {
        match seen.get(&item.image) {
            Some(seen) => judged.extend(desk.judge(item, *seen, &mut found)),
            None => {
                let name = item.image.display().to_string();
                found.leave_out(&item.file, item.row, &name, "its image cannot be read");
            }
        }
    }
    found.report.leaks = leaks(&judged);
    found.report.split_patients = split_patients(&judged);
    if options.drop_leaks {
        let copies: BTreeSet<String> = found.report.leaks.iter().map(|l| l.copy.clone()).collect();
        let (copies, rest): (Vec<_>, Vec<_>) = judged.into_iter().partition(|j| copies.contains(&j.record.id));
        for j in copies {
            found.leave_out(&j.origin.file, j.origin.row, &j.record.id, "its image is also in another split");
        }
        judged = rest;
    }
    if let Some(split) = &options.split {
        judged.retain(|j| j.record.split == *split);
    }
    let mut list = Vec::with_capacity(judged.len());
    for j in judged {
        let image = reach(&mut images, &j.origin.image, j.origin.window)?;
        found.report.objects += j.origin.objects;
        found.report.boxes += j.record.boxes.len();
        *found.report.splits.entry(j.record.split.clone()).or_default() += 1;
        list.push(Record { image, ..j.record });
    }
    if list.is_empty() {
        return Err(nothing(&found, options));
    }
    records::write(out, &list)?;
    found.report.records = list.len();
    found.report.images_copied_to = images.copies();
    Ok(found.report)
}

/// Where a record comes from.
struct Origin {
    file: PathBuf,
    row: usize,
    image: PathBuf,
    window: Option<(f32, f32)>,
    objects: usize,
}

/// The split of an item, as far as it does not depend on the image's pixels. Strict sets keep images that no list names without one.
fn known_split<'a>(item: &'a Item, strict: bool, options: &ImportOptions) -> Option<&'a str> {
    if !options.resplit && (strict || !item.split.is_empty()) {
        return Some(&item.split);
    }
    Some(&item.patient).filter(|p| !p.is_empty()).map(|p| assigned(p.as_bytes()))
}

/// Fails where no item has an object or a question of its own: the set would say "no finding" of everything.
fn some_object(found: &Found) -> Result<(), ImportError> {
    let says = |i: &Item| i.text_only || !(i.objects.is_empty() && i.unread.is_empty() && i.dropped.is_empty());
    if found.items.is_empty() || found.items.iter().any(says) {
        return Ok(());
    }
    let what = "not one object in the whole set: every image would become \"no finding\"; is this the folder that holds the annotations?";
    Err(found.source.wrong(what))
}

/// Leaves out images whose path a record, which is UTF-8, cannot name.
fn leave_out_unwritable(found: &mut Found) {
    for item in std::mem::take(&mut found.items) {
        let roots = [Some(&found.source.root), found.source.images.as_ref()];
        let below = roots.into_iter().flatten().find_map(|r| item.image.strip_prefix(r).ok()).unwrap_or(&item.image);
        match below.to_str() {
            Some(_) => found.items.push(item),
            None => {
                let name = below.display().to_string();
                found.leave_out(&item.file, item.row, &name, "its image's path is not UTF-8 (rename the file)");
            }
        }
    }
}

/// What is asked of an image without a question of its own.
fn question(found: &Found, options: &ImportOptions, all: &BTreeSet<String>) -> Result<String, ImportError> {
    let classes = &found.report.classes;
    let words = match &options.class {
        Some(f) if !classes.contains_key(&f.class) => {
            let known: Vec<&str> = classes.keys().map(String::as_str).collect();
            let what = format!("no object of class \"{}\"; the classes are {}", f.class, known.join(", "));
            return Err(found.source.wrong(what));
        }
        Some(f) => f.category.clone(),
        // A split without an object is asked for the classes of the set.
        None if classes.is_empty() => all.iter().cloned().collect::<Vec<_>>().join(", "),
        None => classes.keys().cloned().collect::<Vec<_>>().join(", "),
    };
    let own = found.question.filter(|_| options.class.is_none()).map(str::to_owned);
    Ok(options.question.clone().or(own).unwrap_or_else(|| format!("Where is the {words}?")))
}

/// What is the same for all records of an import, and the ids that are taken.
struct Desk<'a> {
    question: String,
    source: String,
    options: &'a ImportOptions,
    ids: HashMap<String, usize>,
}

impl Desk<'_> {
    /// One record; none where the item lost an object that could not be read or named, or all of its objects, for that is no "no finding".
    fn judge(&mut self, item: Item, seen: Seen, found: &mut Found) -> Option<Judged<Origin>> {
        let file = item.file.display().to_string();
        if item.frame.is_some_and(|f| f != seen.size) {
            found.report.size_mismatch.push(file.clone());
        }
        // An object of no known class may be of the one that is asked for.
        let asked = |class: &String| self.options.class.as_ref().is_none_or(|f| class.is_empty() || f.class == *class);
        let unnamed = |o: &&Object| o.label.trim().is_empty();
        for (object, _) in item.objects.iter().enumerate().filter(|(_, o)| unnamed(o)) {
            found.leave_out(&item.file, object, "", "has no class");
        }
        if item.unread.iter().any(asked) || item.objects.iter().any(|o| unnamed(&o)) {
            found.leave_out(&item.file, item.row, &item.id, "one of its objects could not be read or named");
            return None;
        }
        if item.question.is_some() && !item.objects.is_empty() && !item.objects.iter().any(|o| asked(&o.label)) {
            found.leave_out(&item.file, item.row, &item.id, "its question is about other classes");
            return None;
        }
        let (mut boxes, mut labels) = (Vec::<BBox>::new(), Vec::new());
        let mut faulty = item.dropped.iter().filter(|c| asked(c)).count();
        for (object, o) in item.objects.iter().enumerate() {
            let label = match &self.options.class {
                Some(f) if f.class != o.label => continue,
                Some(f) => f.category.clone(),
                None => o.label.clone(),
            };
            match place(o.coords, item.frame, seen.size, found.strict) {
                Ok(p) => {
                    found.report.clipped += usize::from(p.clipped);
                    found.report.scaled += usize::from(p.scaled);
                    boxes.push(p.b);
                    labels.push(label);
                }
                Err(reason) => {
                    faulty += 1;
                    let (label, coords) = (o.label.clone(), Some(o.coords.numbers()));
                    found.report.leave_out(LeftOut { file: file.clone(), object, label, reason, coords });
                }
            }
        }
        if boxes.is_empty() && faulty > 0 {
            found.leave_out(&item.file, item.row, &item.id, "all its boxes were left out");
            return None;
        }
        let category = match &self.options.class {
            Some(f) => f.category.clone(),
            None => {
                labels.iter().map(String::as_str).collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join(", ")
            }
        };
        let split = known_split(&item, found.strict, self.options);
        let split = split.unwrap_or_else(|| assigned(seen.pixels.as_bytes())).to_owned();
        let mut extra = item.extra;
        if !item.patient.is_empty() {
            extra.insert("patient".to_owned(), json!(item.patient));
        }
        let task = self.options.task.as_ref().unwrap_or(&item.suite_task);
        if !task.is_empty() {
            extra.insert("suite_task".to_owned(), json!(task));
        }
        let (width, height) = seen.size;
        let record = Record {
            id: self.unique(item.id),
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
        let (file, row, image, window) = (item.file, item.row, item.image, item.window);
        let origin = Origin { file, row, image, window, objects: item.objects.len() };
        Some(Judged { record, patient: item.patient, seen, origin })
    }

    /// The id, or the id with the first free number from 2 on.
    fn unique(&mut self, id: String) -> String {
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

fn nothing(found: &Found, options: &ImportOptions) -> ImportError {
    let reasons: Vec<String> = found.report.left_out_by_reason.iter().map(|(r, n)| format!("{n}: {r}")).collect();
    let left = if reasons.is_empty() { String::new() } else { format!("; left out: {}", reasons.join("; ")) };
    let what = match &options.split {
        Some(split) => format!("no record in split \"{split}\" (splits are train, val, test){left}"),
        None => format!("no record is left{left}"),
    };
    found.source.wrong(what)
}
