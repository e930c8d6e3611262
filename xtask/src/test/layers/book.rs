//! Files, items and tests named in the documentation must exist.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Package;
use super::homes::relative;
use super::source::{self, UnitTests};
use crate::exec;

/// Returns the links, paths and items in each page that do not exist, and the missing tests that
/// `docs/security.md` relies on.
pub fn check(packages: &[Package]) -> Result<Vec<String>> {
    let root = exec::root();
    let readmes = packages.iter().map(|package| package.dir.join("README.md"));
    let mut pages: Vec<PathBuf> = readmes.filter(|page| page.exists()).collect();
    for dir in [root.to_path_buf(), root.join("docs")] {
        for entry in fs::read_dir(&dir).with_context(|| relative(&dir))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    let Names { functions, identifiers } = names(packages)?;
    let mut faults = Vec::new();
    for page in &pages {
        let text = fs::read_to_string(page).with_context(|| relative(page))?;
        for link in links(&text).filter(|link| !there(page, link)) {
            faults.push(format!("{}: the link {link} leads nowhere", relative(page)));
        }
        // It contains the old names of items that were renamed since.
        if page.ends_with("CHANGELOG.md") {
            continue;
        }
        for path in quoted(&text).filter(|quoted| is_path(&root, quoted)) {
            if !root.join(path).exists() {
                faults.push(format!("{}: there is no {path}", relative(page)));
            }
        }
        for item in quoted(&text).flat_map(items) {
            if !identifiers.contains(item) {
                faults.push(format!("{}: nothing is called {item}", relative(page)));
            }
        }
    }
    let security = root.join("docs/security.md");
    for name in tests_named(&fs::read_to_string(&security)?) {
        if !functions.contains(name) {
            faults.push(format!("{}: there is no test {name}", relative(&security)));
        }
    }
    Ok(faults)
}

/// Returns the targets of `[…](…)` in a page.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link)
}

/// Returns whether the target of a link exists; external links are not checked.
fn there(page: &Path, link: &str) -> bool {
    let file = link.split('#').next().unwrap_or_default();
    let dir = page.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    file.is_empty() || file.contains("://") || dir.join(file).exists()
}

/// Returns the texts between backticks, outside of code blocks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(str::lines).flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Returns whether it is a path below one of the project's directories.
fn is_path(root: &Path, quoted: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    let folder = quoted.split_once('/').map(|(folder, _)| folder);
    let is_ours = |folder: &str| !folder.is_empty() && root.join(folder).is_dir();
    quoted.chars().all(plain) && folder.is_some_and(is_ours)
}

/// Returns the parts of `Type` or `Type::item`; none for other texts.
fn items(quoted: &str) -> Vec<&str> {
    let parts: Vec<&str> = quoted.split("::").collect();
    let word = |part: &&str| part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let is_type = parts.iter().any(|part| {
        let camel = |c: char| c.is_ascii_alphanumeric();
        part.starts_with(|c: char| c.is_ascii_uppercase())
            && part.contains(|c: char| c.is_ascii_lowercase())
            && part.chars().all(camel)
    });
    if is_type && parts.iter().all(word) { parts } else { Vec::new() }
}

/// Returns the last part of every `` `path::to::test` `` of a page.
fn tests_named(text: &str) -> impl Iterator<Item = &str> {
    quoted(text).filter_map(|words| {
        let (path, test) = words.rsplit_once("::")?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-:".contains(c);
        (path.chars().all(plain) && test.chars().all(plain) && test.contains('_')).then_some(test)
    })
}

/// Names of items in the workspace.
#[derive(Default)]
struct Names {
    functions: HashSet<String>,
    identifiers: HashSet<String>,
}

fn names(packages: &[Package]) -> Result<Names> {
    let mut names = Names::default();
    for package in packages {
        for file in source::files(&package.dir)? {
            let tokens = source::tokens(&file, UnitTests::Keep)?;
            let definitions = tokens.windows(2).filter(|two| two[0].text == "fn");
            names.functions.extend(definitions.map(|two| two[1].text.clone()));
            let words = tokens.into_iter().filter(|token| !token.literal);
            names.identifiers.extend(words.map(|token| token.text));
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
    fn paths_and_items_are_told_from_other_words() {
        let root = exec::root();
        assert!(is_path(&root, "xtask/src/nothing.rs") && is_path(&root, "docs/"));
        for other in ["/dev/xen", "run/pvio", "a b/c", "xtask/<name>.rs", "Queue"] {
            assert!(!is_path(&root, other), "{other}");
        }
        assert_eq!(items("Queue::poll"), ["Queue", "poll"]);
        for other in ["a_b", "O_DIRECT", "INITWAIT", "Queue::poll()", "--disk PATH", "x::y"] {
            assert!(items(other).is_empty(), "{other}");
        }
        assert_eq!(quoted("`a`\n```\n`b`\n```\n`c`").collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn a_link_is_followed_from_its_page() {
        let page = exec::root().join("xtask/page.md");
        assert!(there(&page, "src/main.rs#there") && there(&page, "https://example.org/x"));
        assert!(!there(&page, "src/nothing.rs"));
    }
}
