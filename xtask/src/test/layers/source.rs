//! A source file as tokens: keywords and string literals, no comments, optionally no unit tests.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// A word or literal, and its line.
pub struct Token {
    /// The text as written; a literal includes its quotes.
    pub text: String,
    /// Number of the line, starting with 1.
    pub line: usize,
    /// It is a literal of any kind.
    pub literal: bool,
}

/// Whether code guarded by `#[cfg(test)]` is included.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum UnitTests {
    /// It is included, like any other code.
    Keep,
    /// It is left out, since it plays both sides of a device and may contain their keys.
    Leave,
}

/// Returns all words and literals of a file.
///
/// # Errors
/// The file cannot be read, or is not valid Rust.
pub fn tokens(file: &Path, unit_tests: UnitTests) -> Result<Vec<Token>> {
    let text = fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
    lex(&text, unit_tests).with_context(|| file.display().to_string())
}

fn lex(text: &str, unit_tests: UnitTests) -> Result<Vec<Token>> {
    let stream: TokenStream = text.parse().map_err(|error| anyhow!("not Rust: {error}"))?;
    let mut found = Vec::new();
    walk(stream, unit_tests, &mut found);
    Ok(found)
}

fn walk(stream: TokenStream, unit_tests: UnitTests, found: &mut Vec<Token>) {
    let mut trees = stream.into_iter().peekable();
    let mut in_test_item = false;
    while let Some(tree) = trees.next() {
        match tree {
            TokenTree::Punct(hash) if hash.as_char() == '#' => {
                trees.next_if(|next| matches!(next, TokenTree::Punct(p) if p.as_char() == '!'));
                let attribute = trees.next_if(|next| bracket(next).is_some());
                let Some(words) = attribute.as_ref().and_then(bracket) else { continue };
                let written = words.stream().to_string().replace(' ', "");
                in_test_item |= unit_tests == UnitTests::Leave && written == "cfg(test)";
                // The parser has converted doc comments to attributes: `#[doc = "…"]`.
                if !written.starts_with("doc") {
                    walk(words.stream(), unit_tests, found);
                }
            }
            // The guarded item ends with its braces, or with a semicolon if it has none.
            TokenTree::Group(group) if in_test_item => {
                in_test_item = group.delimiter() != Delimiter::Brace;
            }
            TokenTree::Punct(end) if in_test_item => in_test_item = end.as_char() != ';',
            _ if in_test_item => {}
            TokenTree::Group(group) => walk(group.stream(), unit_tests, found),
            TokenTree::Ident(word) => {
                let line = word.span().start().line;
                found.push(Token { text: word.to_string(), line, literal: false });
            }
            TokenTree::Literal(literal) => {
                let line = literal.span().start().line;
                found.push(Token { text: literal.to_string(), line, literal: true });
            }
            TokenTree::Punct(_) => {}
        }
    }
}

fn bracket(tree: &TokenTree) -> Option<&Group> {
    match tree {
        TokenTree::Group(group) if group.delimiter() == Delimiter::Bracket => Some(group),
        _ => None,
    }
}

/// Returns all `.rs` files below a directory, except build output.
///
/// # Errors
/// A directory cannot be read.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            files.extend(self::files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = r##"
//! unsafe, "ring-ref"
/// unsafe, "ring-ref"
#[expect(unsafe_code)]
fn f() -> &'static str {
    // unsafe
    let _ = "unsafe";
    unsafe { g() };
    r#"ring-ref"#
}
#[cfg(test)]
use crate::key("event-channel");
#[cfg(test)]
mod tests {
    const KEY: &str = "tx-ring-ref";
}
const AFTER: u8 = b'a';
"##;

    fn lines(text: &str, unit_tests: UnitTests) -> Vec<usize> {
        let tokens = lex(SOURCE, unit_tests).unwrap();
        tokens.iter().filter(|token| token.text.contains(text)).map(|token| token.line).collect()
    }

    #[test]
    fn keyword_in_code_counts_and_in_comment_does_not() {
        let tokens = lex(SOURCE, UnitTests::Keep).unwrap();
        let keywords: Vec<_> = tokens.iter().filter(|token| token.text == "unsafe").collect();
        assert_eq!(keywords.len(), 1);
        assert_eq!((keywords[0].line, keywords[0].literal), (8, false));
    }

    #[test]
    fn unit_tests_are_skipped_on_request() {
        assert_eq!(lines("ring-ref", UnitTests::Keep), [9, 15]);
        assert_eq!(lines("ring-ref", UnitTests::Leave), [9]);
        assert_eq!(lines("event-channel", UnitTests::Leave), [0; 0]);
        assert_eq!(lines("b'a'", UnitTests::Leave), [17], "line after the unit tests counts");
    }
}
