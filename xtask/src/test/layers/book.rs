//! The book names files and tests that exist.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Package;
use super::homes::relative;
use super::source::{self, UnitTests};
use crate::exec;

/// Every link of README.md and `docs/` to a file that is not there, and every test that
/// `docs/security.md` counts on and nobody wrote.
pub fn check(packages: &[Package]) -> Result<Vec<String>> {
    let root = exec::root();
    let mut pages = vec![root.join("README.md"), root.join("CHANGELOG.md")];
    for entry in fs::read_dir(root.join("docs")).context("read docs")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
    let mut faults = Vec::new();
    for page in &pages {
        let text = fs::read_to_string(page).with_context(|| relative(page))?;
        for link in links(&text).filter(|link| !there(page, link)) {
            faults.push(format!("{}: the link {link} leads nowhere", relative(page)));
        }
    }
    let functions = functions(packages)?;
    let security = root.join("docs/security.md");
    for name in tests_named(&fs::read_to_string(&security)?) {
        if !functions.contains(name) {
            faults.push(format!("{}: there is no test {name}", relative(&security)));
        }
    }
    Ok(faults)
}

/// The targets of `[…](…)` in a page.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link)
}

/// Whether a link of a page leads to a file, or away.
fn there(page: &Path, link: &str) -> bool {
    let file = link.split('#').next().unwrap_or_default();
    let dir = page.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    file.is_empty() || file.contains("://") || dir.join(file).exists()
}

/// The last part of every `` `path::to::test` `` of a page.
fn tests_named(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.lines().flat_map(|line| line.split('`').skip(1).step_by(2));
    quoted.filter_map(|words| {
        let (path, test) = words.rsplit_once("::")?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-:".contains(c);
        (path.chars().all(plain) && test.chars().all(plain) && test.contains('_')).then_some(test)
    })
}

/// The name of every function in the workspace.
fn functions(packages: &[Package]) -> Result<HashSet<String>> {
    let mut names = HashSet::new();
    for package in packages {
        for file in source::files(&package.dir)? {
            let tokens = source::tokens(&file, UnitTests::Keep)?;
            let definitions = tokens.windows(2).filter(|two| two[0].text == "fn");
            names.extend(definitions.map(|two| two[1].text.clone()));
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_tests_are_found() {
        let text = "[a](b.md) and ![c](d.svg#e): `ring::hostile::a_b`, `Region::read`, `f()`";
        assert_eq!(links(text).collect::<Vec<_>>(), ["b.md", "d.svg#e"]);
        assert_eq!(tests_named(text).collect::<Vec<_>>(), ["a_b"]);
    }

    #[test]
    fn a_link_is_followed_from_its_page() {
        let page = exec::root().join("xtask/page.md");
        assert!(there(&page, "src/main.rs#there") && there(&page, "https://example.org/x"));
        assert!(!there(&page, "src/nothing.rs"));
    }
}
