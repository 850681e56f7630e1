//! PMC-VQA (<https://huggingface.co/datasets/xmcmic/PMC-VQA>; Zhang et al., 2023): `{train,test}.csv` (columns `Figure_path`, `Question`,
//! `Answer`, `Choice A` … `Choice D`, `Answer_label`) and the second version, `{train,test}_2.csv`, where `Answer` is the letter; figures in
//! `images/`, `images_2/` or `figures/`.
//!
//! Where `test_clean.csv` (the checked part of the test set) is there, it stands for `test.csv`. Choices bring their letter along
//! (` A:Atelectasis `), which is dropped. Left out: questions whose answer is none of their choices, figures that are not there.

use super::ImportError;
use super::choices::{self, NO_CHOICE};
use super::item::{Found, Item};
use super::source::stem;
use super::split::named;

const FOLDERS: [&str; 4] = ["images", "images_2", "figures", ""];

pub(super) fn read(found: &mut Found) -> Result<(), ImportError> {
    let root = found.source.root.clone();
    let mut files = found.source.files(&root, &["csv"], 1);
    if files.iter().any(|f| f.ends_with("test_clean.csv")) {
        files.retain(|f| !f.ends_with("test.csv"));
    }
    if files.is_empty() {
        return Err(found.source.wrong("no train.csv, test.csv, train_2.csv or test_2.csv"));
    }
    for file in files {
        let table = found.source.csv(&file)?;
        let (figure, question, answer) =
            (table.column("Figure_path")?, table.column("Question")?, table.column("Answer")?);
        let letters = ['A', 'B', 'C', 'D'];
        let mut columns = Vec::new();
        for letter in letters {
            columns.push((letter, table.column(&format!("Choice {letter}"))?));
        }
        let label = table.find("Answer_label");
        for (row, r) in table.rows.iter().enumerate() {
            let field = |c: usize| r.get(c).unwrap_or_default();
            let choices = columns.iter().map(|(l, c)| (*l, choices::unlettered(*l, field(*c)))).collect();
            let as_letter = |text: &str| text.parse::<char>().ok().filter(|c| letters.contains(c));
            let right = label.and_then(|c| as_letter(field(c))).or_else(|| as_letter(field(answer)));
            let right = right.or_else(|| choices::letter_of(&choices, field(answer)));
            let mut item = Item {
                id: format!("{}-{row}", stem(&file)),
                file: file.clone(),
                row,
                split: named(&stem(&file)).to_owned(),
                ..Item::default()
            };
            let made = found.source.image(&FOLDERS, field(figure)).and_then(|image| {
                item.image = image;
                choices::ask(&mut item, field(question), &choices, right.ok_or(NO_CHOICE)?)
            });
            match made {
                Ok(()) => found.items.push(item),
                Err(reason) => found.leave_out(&file, row, field(figure), reason),
            }
        }
    }
    Ok(())
}
