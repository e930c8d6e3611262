//! Number of `unsafe` blocks, implementations and declarations in each file, and the table of them
//! in `ARCHITECTURE.md`.

use std::collections::BTreeMap;
use std::fs;
use std::iter::Sum;
use std::ops::Add;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::homes::{UNSAFE_HOMES, relative};
use super::{Package, source};
use crate::exec;

const PAGE: &str = "ARCHITECTURE.md";
const HEADING: &str = "## Where `unsafe` stands\n";
const BEGIN: &str = "<!-- written by `cargo xtask tables` -->\n";
const END: &str = "<!-- end -->\n";

/// Occurrences of `unsafe` in a file.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Occurrences {
    /// `unsafe { … }`.
    blocks: usize,
    /// `unsafe impl`.
    impls: usize,
    /// Functions, traits, foreign blocks and attributes.
    declarations: usize,
}

impl Add for Occurrences {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            blocks: self.blocks + other.blocks,
            impls: self.impls + other.impls,
            declarations: self.declarations + other.declarations,
        }
    }
}

impl Sum for Occurrences {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

/// Files that contain `unsafe`, by path relative to the root, with their packages.
pub type Files = BTreeMap<String, (String, Occurrences)>;

/// Counts the occurrences in all files of `packages`.
pub fn count(packages: &[Package]) -> Result<Files> {
    let mut files = Files::new();
    for package in packages {
        for file in source::files(&package.dir)? {
            let found = count_in(&file)?;
            if found != Occurrences::default() {
                files.insert(relative(&file), (package.name.clone(), found));
            }
        }
    }
    Ok(files)
}

fn count_in(file: &Path) -> Result<Occurrences> {
    let text = fs::read_to_string(file).with_context(|| relative(file))?;
    let stream = text.parse().map_err(|error| anyhow!("{}: {error}", relative(file)))?;
    let mut found = Occurrences::default();
    walk(stream, &mut found);
    Ok(found)
}

fn walk(stream: TokenStream, found: &mut Occurrences) {
    let mut trees = stream.into_iter().peekable();
    while let Some(tree) = trees.next() {
        match tree {
            TokenTree::Group(group) => walk(group.stream(), found),
            TokenTree::Ident(word) if word == "unsafe" => match trees.peek() {
                Some(TokenTree::Group(block)) if block.delimiter() == Delimiter::Brace => {
                    found.blocks += 1;
                }
                Some(TokenTree::Ident(next)) if next == "impl" => found.impls += 1,
                _ => found.declarations += 1,
            },
            _ => {}
        }
    }
}

/// Returns a line for each package with `unsafe` code, and a line for all others.
pub fn per_package(files: &Files, packages: &[Package]) -> Vec<String> {
    let mut lines = vec![format!(
        "{:<22} {:>5} {:>6} {:>5} {:>12}",
        "unsafe code of", "files", "blocks", "impls", "declarations"
    )];
    let mut without = 0;
    for package in packages {
        let of_it = files.values().filter(|(name, _)| *name == package.name);
        let (number, sum) = (of_it.clone().count(), of_it.map(|(_, found)| *found).sum());
        if number == 0 {
            without += 1;
            continue;
        }
        let Occurrences { blocks, impls, declarations } = sum;
        lines.push(format!(
            "{:<22} {number:>5} {blocks:>6} {impls:>5} {declarations:>12}",
            package.name
        ));
    }
    lines.push(format!("{without} other packages have none"));
    lines
}

/// Returns how the section in `ARCHITECTURE.md` differs from the sources.
pub fn check(files: &Files) -> Result<Vec<String>> {
    let text = fs::read_to_string(exec::root().join(PAGE)).context(PAGE)?;
    Ok(faults(&text, files))
}

fn faults(text: &str, files: &Files) -> Vec<String> {
    let section = text.split_once(HEADING).and_then(|(_, rest)| rest.split("\n## ").next());
    let Some(section) = section else { return vec![format!("{PAGE}: no section {HEADING}")] };
    let mut faults: Vec<String> = UNSAFE_HOMES
        .iter()
        .filter(|home| !section.contains(&format!("`{home}`")))
        .map(|home| format!("{PAGE}: the section about `unsafe` does not say why {home} needs it"))
        .collect();
    if between(section) != Some(table(files).as_str()) {
        faults
            .push(format!("{PAGE}: run `cargo xtask tables`; the table must be\n{}", table(files)));
    }
    faults
}

/// Writes the table to `ARCHITECTURE.md`.
///
/// # Errors
/// The page cannot be read or written, or lacks the two comments around the table.
pub fn write(files: &Files) -> Result<()> {
    let page = exec::root().join(PAGE);
    let text = fs::read_to_string(&page).context(PAGE)?;
    let old = between(&text).with_context(|| format!("{PAGE}: no {BEGIN}"))?;
    let new =
        text.replacen(&format!("{BEGIN}{old}{END}"), &format!("{BEGIN}{}{END}", table(files)), 1);
    fs::write(&page, new).context(PAGE)
}

fn between(text: &str) -> Option<&str> {
    Some(text.split_once(BEGIN)?.1.split_once(END)?.0)
}

fn table(files: &Files) -> String {
    let mut table = "| file | blocks | impls | declarations |\n|---|---|---|---|\n".to_owned();
    for (file, (_, Occurrences { blocks, impls, declarations })) in files {
        table += &format!("| `{file}` | {blocks} | {impls} | {declarations} |\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(text: &str) -> Occurrences {
        let mut found = Occurrences::default();
        walk(text.parse().unwrap(), &mut found);
        found
    }

    fn one_file() -> Files {
        let found = Occurrences { blocks: 3, impls: 1, declarations: 0 };
        Files::from([("ring/src/shm.rs".to_owned(), ("pvio-ring".to_owned(), found))])
    }

    #[test]
    fn blocks_impls_and_declarations_are_counted_and_comments_are_not() {
        let text = "/// unsafe
            unsafe trait T {} unsafe impl T for u8 {}
            #[unsafe(no_mangle)] unsafe extern \"C\" {}
            unsafe fn f() { let a = unsafe { g() }; m!(unsafe { h() }); \"unsafe\"; }";
        assert_eq!(counted(text), Occurrences { blocks: 2, impls: 1, declarations: 4 });
    }

    #[test]
    fn page_with_another_count_or_without_a_home_is_a_fault() {
        let files = one_file();
        let homes: String = UNSAFE_HOMES.iter().map(|home| format!("| `{home}` | |\n")).collect();
        let page = |table: &str| format!("# A\n\n{HEADING}\n{homes}\n{BEGIN}{table}{END}\n## B\n");
        assert_eq!(faults(&page(&table(&files)), &files), [""; 0]);
        assert_eq!(faults(&page(&table(&files).replace('3', "4")), &files).len(), 1);
        let last = UNSAFE_HOMES[UNSAFE_HOMES.len() - 1];
        let without = page(&table(&files)).replace(&format!("| `{last}`"), "");
        assert_eq!(faults(&without, &files).len(), 1, "{last}");
        assert_eq!(faults("# A\n", &files).len(), 1);
    }

    #[test]
    fn table_of_packages_has_a_line_for_each_with_unsafe_code() {
        let package = |name: &str| Package { name: name.to_owned(), ..Package::default() };
        let lines = per_package(&one_file(), &[package("pvio-ring"), package("pvio")]);
        assert!(lines[1].starts_with("pvio-ring ") && lines[1].contains(" 3 "), "{lines:?}");
        assert_eq!(lines[2], "1 other packages have none");
    }
}
