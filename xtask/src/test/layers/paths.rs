//! Full paths of modules, functions and tests, as documentation names them:
//! `blkback::queue::killed::server_is_killed`, without the `pvio-` of the package.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::homes::relative;
use super::{Package, source};

/// Paths of all modules and functions of a workspace.
#[derive(Default)]
pub struct Paths {
    crates: HashSet<String>,
    known: HashSet<String>,
}

impl Paths {
    /// Reads all sources of `packages`.
    ///
    /// # Errors
    /// A file cannot be read, or is not valid Rust.
    pub fn read(packages: &[Package]) -> Result<Self> {
        let mut paths = Self::default();
        for package in packages {
            let name = short(&package.name);
            for file in source::files(&package.dir)? {
                let text = fs::read_to_string(&file).with_context(|| relative(&file))?;
                let stream =
                    text.parse().map_err(|error| anyhow!("{}: {error}", relative(&file)))?;
                let inside = file.strip_prefix(&package.dir).unwrap_or(&file);
                paths.add(&module(name, inside), stream);
            }
            paths.crates.insert(name.to_owned());
        }
        Ok(paths)
    }

    /// Adds the functions and inline modules of a module.
    fn add(&mut self, module: &str, stream: TokenStream) {
        self.known.insert(module.to_owned());
        let mut trees = stream.into_iter().peekable();
        while let Some(tree) = trees.next() {
            match tree {
                TokenTree::Group(group) => self.add(module, group.stream()),
                TokenTree::Ident(word) if word == "fn" || word == "mod" => {
                    let Some(TokenTree::Ident(name)) = trees.peek() else { continue };
                    let path = format!("{module}::{name}");
                    trees.next();
                    if let Some(TokenTree::Group(body)) =
                        trees.next_if(|next| word == "mod" && is_braced(next))
                    {
                        self.add(&path, body.stream());
                    }
                    self.known.insert(path);
                }
                _ => {}
            }
        }
    }

    /// Returns whether a text is the path of something in a crate of the workspace, and that does
    /// not exist.
    pub fn is_missing(&self, text: &str) -> bool {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_-:".contains(c);
        let ours = text.split_once("::").is_some_and(|(first, _)| self.crates.contains(first));
        ours && text.chars().all(plain) && !self.known.contains(text)
    }
}

fn short(package: &str) -> &str {
    package.strip_prefix("pvio-").unwrap_or(package)
}

/// Returns the path of a file's module. Test programs are like modules of their crate.
fn module(name: &str, file: &Path) -> String {
    let mut path = name.to_owned();
    for part in file.with_extension("").iter().skip(1).map(|part| part.to_string_lossy()) {
        if !["lib", "main", "mod"].contains(&&*part) {
            path += "::";
            path += &part;
        }
    }
    path
}

fn is_braced(tree: &TokenTree) -> bool {
    matches!(tree, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_has_the_path_of_its_module_or_test_program() {
        for (file, path) in [
            ("src/lib.rs", "ring"),
            ("src/proto/mod.rs", "ring::proto"),
            ("src/proto/blkif.rs", "ring::proto::blkif"),
            ("tests/queue/main.rs", "ring::queue"),
            ("tests/queue/late.rs", "ring::queue::late"),
        ] {
            assert_eq!(module("ring", Path::new(file)), path);
        }
    }

    #[test]
    fn path_that_lacks_a_module_or_names_another_is_missing() {
        let mut paths = Paths::default();
        paths.crates.insert("ring".to_owned());
        let text = "fn f() {} mod tests { proptest! { #[test] fn a_b(n in 0..3) {} } }";
        paths.add("ring::proto", text.parse().unwrap());
        for there in ["ring::proto", "ring::proto::f", "ring::proto::tests::a_b"] {
            assert!(!paths.is_missing(there), "{there}");
        }
        for missing in ["ring::a_b", "ring::proto::a_b", "ring::other", "ring::proto::tests::c"] {
            assert!(paths.is_missing(missing), "{missing}");
        }
        for other in ["std::thread", "ring", "ring::Queue", "ring::f()"] {
            assert!(!paths.is_missing(other), "{other}");
        }
    }
}
