//! `CONFORMANCE.md` names every test of the device, and no other.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

type Names = BTreeSet<String>;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// What the document names, by file.
fn documented(text: &str) -> BTreeMap<String, Names> {
    let mut files = BTreeMap::<String, Names>::new();
    let mut file = None;
    for line in text.lines() {
        let quoted = |part: &str| Some(part.split('`').nth(1)?.to_owned());
        if line.starts_with("## ") {
            file = quoted(line);
        } else if let (Some(file), Some(test)) = (&file, line.rsplit('|').nth(1).and_then(quoted)) {
            let new = files.entry(file.clone()).or_default().insert(test.clone());
            assert!(new, "{test} of {file} is there twice");
        }
    }
    files
}

/// The tests in a source file; those with a guest have steps, which get the scene and may fail.
fn tests(source: &str) -> Names {
    let mut names = Names::new();
    let mut marked = false;
    for line in source.lines() {
        let function = line
            .strip_prefix("fn ")
            .and_then(|rest| rest.split_once('('));
        marked |= line == "#[test]";
        if let Some((name, rest)) = function {
            let step = [
                "scene: &Scene) -> Result<()> {",
                "scene: &mut Scene) -> Result<()> {",
            ];
            if std::mem::take(&mut marked) || step.contains(&rest) {
                names.insert(name.to_owned());
            }
        }
    }
    names
}

#[test]
fn the_document_names_every_test_of_the_device_and_no_other() {
    let text = fs::read_to_string(root().join("tests/CONFORMANCE.md")).unwrap();
    let documented = documented(&text);
    for (file, named) in &documented {
        let source = fs::read_to_string(root().join(file));
        let there = tests(&source.unwrap_or_else(|error| panic!("{file}: {error}")));
        let missing: Vec<_> = there.difference(named).collect();
        let gone: Vec<_> = named.difference(&there).collect();
        assert!(
            missing.is_empty() && gone.is_empty(),
            "CONFORMANCE.md on {file}: not named: {missing:?}; named, but not there: {gone:?}"
        );
    }
    for entry in fs::read_dir(root().join("host-backend/tests")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let file = format!("host-backend/tests/{name}");
        let source = fs::read_to_string(root().join(&file)).unwrap_or_default();
        // The tests of the command line are about the program and not about the device.
        let plays = source.contains("\nmod frontend;\n") && !tests(&source).is_empty();
        assert!(
            !plays || documented.contains_key(&file) || name == "program.rs",
            "CONFORMANCE.md says nothing of {file}"
        );
    }
}
