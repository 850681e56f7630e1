//! PMC-VQA (<https://huggingface.co/datasets/xmcmic/PMC-VQA>; Zhang et al., 2023).
//!
//! Files: `train.csv` and `test.csv`, and those of the second version, `train_2.csv` and `test_2.csv`; figures in `images/`, `images_2/`,
//! `figures/` or the folder itself. If `test_clean.csv` (the checked part of the test set) exists, it replaces `test.csv`. The split is read
//! from the file name.
//!
//! Fields: `Question` and `Choice A` … `Choice D` become the question; choices lose their own letter (` A:Atelectasis `). The right choice is
//! `Answer_label`, or `Answer`, which is a text in the first version and a letter in the second. `Figure_path` is the image.
//!
//! Left out: questions whose answer is none of their choices, and figures that do not exist.

use super::ImportError;
use super::choices::{self, NO_CHOICE};
use super::draft::{DraftRecord, ParsedDataset};
use super::source::stem;
use super::split::split_from_name;

const FOLDERS: [&str; 4] = ["images", "images_2", "figures", ""];

pub(super) fn read(dataset: &mut ParsedDataset) -> Result<(), ImportError> {
    let root = dataset.source.root.clone();
    let mut files = dataset.source.list_files(&root, &["csv"], 1);
    if files.iter().any(|f| f.ends_with("test_clean.csv")) {
        files.retain(|f| !f.ends_with("test.csv"));
    }
    if files.is_empty() {
        return Err(dataset.source.dataset_error("no train.csv, test.csv, train_2.csv or test_2.csv"));
    }
    for file in files {
        let table = dataset.source.read_csv(&file)?;
        let figure = table.column("Figure_path")?;
        let question = table.column("Question")?;
        let answer = table.column("Answer")?;
        let letters = ['A', 'B', 'C', 'D'];
        let mut columns = Vec::new();
        for letter in letters {
            columns.push((letter, table.column(&format!("Choice {letter}"))?));
        }
        let label = table.find("Answer_label");
        for (row, r) in table.rows.iter().enumerate() {
            let field = |c: usize| r.get(c).unwrap_or_default();
            let choices = columns.iter().map(|(l, c)| (*l, choices::strip_letter(*l, field(*c)))).collect();
            let as_letter = |text: &str| text.parse::<char>().ok().filter(|c| letters.contains(c));
            let right = label.and_then(|c| as_letter(field(c))).or_else(|| as_letter(field(answer)));
            let right = right.or_else(|| choices::letter_of(&choices, field(answer)));
            let mut item = DraftRecord {
                id: format!("{}-{row}", stem(&file)),
                file: file.clone(),
                row,
                split: split_from_name(&stem(&file)).to_owned(),
                ..DraftRecord::default()
            };
            let result = dataset.source.find_image(&FOLDERS, field(figure)).and_then(|image| {
                item.image = image;
                choices::set_question(&mut item, field(question), &choices, right.ok_or(NO_CHOICE)?)
            });
            match result {
                Ok(()) => dataset.items.push(item),
                Err(reason) => dataset.leave_out(&file, row, field(figure), reason),
            }
        }
    }
    Ok(())
}
