//! The pages of the repository: links lead somewhere, paths exist, the front page stays short.

use std::path::{Path, PathBuf};

use unveil_testkit::workspace;

/// Longest front page in lines, and longest line in characters.
const README_LINES: usize = 150;
const README_WIDTH: usize = 140;

/// Every Markdown page that git knows.
fn pages() -> Vec<PathBuf> {
    let root = workspace();
    let out = std::process::Command::new("git").args(["ls-files", "*.md"]).current_dir(&root).output().expect("git");
    let names = String::from_utf8(out.stdout).expect("names of pages");
    let pages: Vec<PathBuf> = names.lines().map(|name| root.join(name)).collect();
    assert!(pages.len() > 10, "pages are found: {names}");
    pages
}

/// Targets of the links `[text](target)` and of pictures in `text`, without those to other hosts.
fn links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter(|target| !target.contains("://")).collect()
}

/// Anchor that a heading gets: lower case, blanks as hyphens, punctuation left out.
fn anchor(heading: &str) -> String {
    let kept = heading.trim_start_matches('#').trim().to_lowercase();
    kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).map(|c| if c == ' ' { '-' } else { c }).collect()
}

fn broken(page: &Path, target: &str) -> bool {
    let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
    let path = if file.is_empty() { page.to_path_buf() } else { page.with_file_name(file) };
    if !path.exists() {
        return true;
    }
    let headings = std::fs::read_to_string(&path).unwrap_or_default();
    !fragment.is_empty() && !headings.lines().any(|line| line.starts_with('#') && anchor(line) == fragment)
}

#[test]
fn links_lead_somewhere() {
    let mut faults = Vec::new();
    for page in pages() {
        let text = std::fs::read_to_string(&page).expect("a page");
        faults
            .extend(links(&text).into_iter().filter(|t| broken(&page, t)).map(|t| format!("{}: {t}", page.display())));
    }
    assert!(faults.is_empty(), "links without a target:\n{}", faults.join("\n"));
    assert!(broken(&workspace().join("README.md"), "crates/nowhere.md"));
    assert!(broken(&workspace().join("README.md"), "crates/README.md#nowhere"));
}

#[test]
fn paths_of_the_architecture_page_exist() {
    let page = workspace().join("crates/README.md");
    let text = std::fs::read_to_string(&page).expect("the page");
    let quoted = text.split('`').skip(1).step_by(2);
    let paths: Vec<&str> = quoted.filter(|q| q.contains('/') && !q.contains(char::is_whitespace)).collect();
    let exists = |p: &&str| page.with_file_name(p).exists() || workspace().join(p).exists();
    let missing: Vec<&&str> = paths.iter().filter(|p| !exists(p)).collect();
    assert!(paths.len() > 20, "paths are found: {paths:?}");
    assert!(missing.is_empty(), "crates/README.md names what is not there: {missing:?}");
}

#[test]
fn the_front_page_is_short() {
    let text = std::fs::read_to_string(workspace().join("README.md")).expect("the page");
    let long: Vec<&str> = text.lines().filter(|line| line.chars().count() > README_WIDTH).collect();
    assert!(long.is_empty(), "lines over {README_WIDTH} characters: {long:#?}");
    assert!(text.lines().count() <= README_LINES, "{} lines", text.lines().count());
}
