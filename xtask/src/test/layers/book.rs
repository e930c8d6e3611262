//! Links, files, items and tests in the documentation must lead to something that exists, and no line
//! is too wide to read.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Package;
use super::homes::relative;
use super::paths::Paths;
use super::source::{self, UnitTests};
use crate::exec;

/// Maximum number of columns of a line.
const WIDTH: usize = 110;

/// Returns the links, files, items and tests in each page that do not exist, and lines that are too
/// wide.
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
    let (identifiers, paths) = (identifiers(packages)?, Paths::read(packages)?);
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
        let wide = (1..).zip(text.lines()).filter(|(_, line)| line.chars().count() > WIDTH);
        for (number, _) in wide {
            faults.push(format!("{}:{number}: more than {WIDTH} columns", relative(page)));
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
        for path in quoted(&text).filter(|quoted| paths.is_missing(quoted)) {
            faults.push(format!("{}: there is no {path}", relative(page)));
        }
    }
    Ok(faults)
}

/// Returns the targets of `[…](…)` in a page.
fn links(text: &str) -> impl Iterator<Item = &str> {
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link)
}

/// Returns whether the target of a link exists, with its heading; external links are not checked.
fn there(page: &Path, link: &str) -> bool {
    let (file, heading) = link.split_once('#').map_or((link, None), |(a, b)| (a, Some(b)));
    let dir = page.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    if file.contains("://") {
        return true;
    }
    let target = if file.is_empty() { page.to_path_buf() } else { dir.join(file) };
    // A `#` behind another file is a part of a picture or a line of a source.
    let Some(heading) = heading.filter(|_| target.extension().is_some_and(|end| end == "md"))
    else {
        return target.exists();
    };
    fs::read_to_string(target).is_ok_and(|text| anchors(&text).iter().any(|one| one == heading))
}

/// Returns the anchors of a page's headings, as GitHub names them.
fn anchors(text: &str) -> Vec<String> {
    let prose = text.split("```").step_by(2);
    let headings = prose.flat_map(str::lines).filter(|line| line.starts_with('#'));
    let mut anchors: Vec<String> = Vec::new();
    for heading in headings {
        let title = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        let earlier = anchors.iter().filter(|one| **one == anchor).count();
        anchors.push(if earlier == 0 { anchor } else { format!("{anchor}-{earlier}") });
    }
    anchors
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

/// Returns all identifiers in the workspace.
fn identifiers(packages: &[Package]) -> Result<HashSet<String>> {
    let mut identifiers = HashSet::new();
    for package in packages {
        for file in source::files(&package.dir)? {
            let words = source::tokens(&file, UnitTests::Keep)?.into_iter();
            identifiers.extend(words.filter(|token| !token.literal).map(|token| token.text));
        }
    }
    Ok(identifiers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_of_links_are_found() {
        let text = "[a](b.md) and ![c](d.svg#e): `ring::hostile::a_b`, `Region::read`, `f()`";
        assert_eq!(links(text).collect::<Vec<_>>(), ["b.md", "d.svg#e"]);
    }

    #[test]
    fn anchor_is_the_heading_in_lower_case_without_punctuation() {
        let text = "# Where `unsafe` stands\n```\n# not one\n```\n## A, b: c-d\n## x_y\n## x_y\n";
        assert_eq!(anchors(text), ["where-unsafe-stands", "a-b-c-d", "x_y", "x_y-1"]);
    }

    #[test]
    fn paths_and_items_are_distinguished_from_other_code_spans() {
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
    fn link_is_resolved_relative_to_its_page() {
        let page = exec::root().join("xtask/page.md");
        assert!(there(&page, "src/main.rs#there") && there(&page, "https://example.org/x"));
        assert!(!there(&page, "src/nothing.rs"));
        assert!(there(&page, "../CONTRIBUTING.md#checks"));
        assert!(!there(&page, "../CONTRIBUTING.md#no-such-heading"));
    }
}
