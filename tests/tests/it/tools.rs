//! The checks of `.ci` find what is planted for them.

use std::path::Path;
use std::process::{Command, Output};

use unveil_testkit::workspace;

fn check(program: &str, args: &[&Path]) -> Output {
    Command::new(workspace().join(".ci").join(program)).args(args).output().expect("the check starts")
}

fn crate_with(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for (name, text) in files {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
        std::fs::write(path, text).expect("a file");
    }
    dir
}

#[test]
fn planted_module_circles_are_found() {
    let main = "mod a;\nmod b;\npub use b::Late;\n";
    for (how, a, b) in [
        ("use", "use crate::b::Late;\npub struct Early(Late);", "use crate::a::Early;\npub struct Late(Box<Early>);"),
        ("inline path", "pub struct Early(crate::b::Late);", "pub struct Late(Box<super::a::Early>);"),
        (
            "re-export",
            "use crate::Late;\npub struct Early(Late);",
            "use crate::a::{self};\npub struct Late(Box<a::Early>);",
        ),
    ] {
        let planted = crate_with(&[("src/lib.rs", main), ("src/a.rs", a), ("src/b.rs", b)]);
        let out = check("circles", &[planted.path()]);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains("crate::a crate::b"), "{how}: {said}");
        let reason = "// Circle with b: each needs the other's type, and both are small.\n";
        let justified = [
            ("src/lib.rs", main.to_owned()),
            ("src/a.rs", format!("{reason}{a}")),
            ("src/b.rs", format!("{reason}{b}")),
        ];
        let justified = crate_with(&justified.each_ref().map(|(name, text)| (*name, text.as_str())));
        assert!(check("circles", &[justified.path()]).status.success(), "{how}: it is justified in both files");
    }
    let tests = "#[cfg(test)]\nmod tests {\n    use crate::b::Late;\n}\npub struct Early; // crate::b::Late\n";
    let straight =
        crate_with(&[("src/lib.rs", main), ("src/a.rs", tests), ("src/b.rs", "pub struct Late(crate::a::Early);")]);
    let out = check("circles", &[straight.path()]);
    assert!(out.status.success(), "tests and comments close no circle: {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn planted_phrases_are_found() {
    let trailing = ["//", "goes", "on"].join(" ");
    let text = format!("/// What it is.\npub fn a() {{}} {trailing}\n\n/// Returns x.\npub fn b() {{}}\n");
    let planted = crate_with(&[("a.rs", text.as_str())]);
    let git = |args: &[&str]| {
        let done = Command::new("git").args(args).current_dir(planted.path()).output().expect("git");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    git(&["init", "-q"]);
    git(&["add", "a.rs"]);
    let out = check("tics", &[planted.path()]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success() && said.contains("a.rs:1") && said.contains("a.rs:2"), "{said}");
    assert!(!said.contains("a.rs:4"), "{said}");
}
