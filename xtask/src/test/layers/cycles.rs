//! Modules of a crate must not import each other in a cycle.
//!
//! A module is a file. It imports another one if it names an item that is defined there; a
//! re-exported name counts as imported from the module that defines it. `mod` declarations,
//! re-exports and unit tests are not imports. A module may also use items of the modules it is
//! nested in: the unit is a directory's `mod.rs`, and the files in the directory are its parts.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemUse, UseTree, Visibility};

use super::Package;
use super::homes::relative;

/// Path of a module relative to the root of its crate, or a path below that.
type ModPath = Vec<String>;

/// Maximum number of re-exports that a name is followed through.
const MAX_HOPS: usize = 8;

/// Returns every group of files that import each other in a cycle.
pub fn check(packages: &[Package]) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    for package in packages {
        for root in &package.roots {
            let mut modules = Modules::default();
            modules.read(root, &[])?;
            let imports = modules.imports();
            for circle in circles(&imports) {
                let arrows = circle.iter().map(|file| {
                    let targets = imports[file].iter().filter(|target| circle.contains(target));
                    let targets: Vec<String> = targets.map(|target| relative(target)).collect();
                    format!("    {} -> {}", relative(file), targets.join(" "))
                });
                let arrows: Vec<String> = arrows.collect();
                faults.push(format!("a circle of imports:\n{}", arrows.join("\n")));
            }
        }
    }
    Ok(faults)
}

/// A module, possibly an inline one.
#[derive(Default)]
struct Module {
    file: PathBuf,
    children: HashSet<String>,
    defined: HashSet<String>,
    /// Names that `use` declarations introduce, with their paths.
    aliases: HashMap<String, ModPath>,
    globs: Vec<ModPath>,
    /// Paths that the module's code contains.
    named: Vec<ModPath>,
}

/// The modules of a crate.
#[derive(Default)]
struct Modules(HashMap<ModPath, Module>);

impl Modules {
    /// Reads a file as the module `at`, and the modules it declares.
    fn read(&mut self, file: &Path, at: &[String]) -> Result<()> {
        let text = fs::read_to_string(file).with_context(|| relative(file))?;
        let parsed = syn::parse_file(&text).with_context(|| relative(file))?;
        let is_root = at.is_empty() || file.file_name().is_some_and(|name| name == "mod.rs");
        let dir = if is_root {
            file.parent().map_or_else(PathBuf::new, Path::to_path_buf)
        } else {
            file.with_extension("")
        };
        self.take(&parsed.items, file, &dir, at)
    }

    fn take(&mut self, items: &[Item], file: &Path, dir: &Path, at: &[String]) -> Result<()> {
        let mut module = Module { file: file.to_path_buf(), ..Module::default() };
        for item in items {
            let Item::Mod(child) = item else { continue };
            if !is_test(&child.attrs) {
                module.children.insert(child.ident.to_string());
            }
        }
        let mut reader = Reader { at: at.to_vec(), module };
        let mut inner = Vec::new();
        for item in items.iter().filter(|item| !is_test(attributes(item))) {
            match item {
                Item::Mod(child) => inner.push(child),
                item => reader.visit_item(item),
            }
        }
        self.0.insert(at.to_vec(), reader.module);
        for child in inner {
            let name = child.ident.to_string();
            let path: ModPath = at.iter().cloned().chain([name.clone()]).collect();
            let below = dir.join(&name);
            match &child.content {
                Some((_, items)) => self.take(items, file, &below, &path)?,
                None => {
                    let flat = dir.join(format!("{name}.rs"));
                    let file = if flat.exists() { flat } else { below.join("mod.rs") };
                    self.read(&file, &path)?;
                }
            }
        }
        Ok(())
    }

    /// Returns the file that defines the target of a path; `None` if it is not in the crate.
    fn file_of(&self, path: &[String], hops: usize) -> Option<&Path> {
        let depth = (0..=path.len()).rev().find(|&depth| self.0.contains_key(&path[..depth]))?;
        let module = &self.0[&path[..depth]];
        let Some(name) = path.get(depth) else { return Some(&module.file) };
        if module.defined.contains(name) || hops == 0 {
            return Some(&module.file);
        }
        if let Some(alias) = module.aliases.get(name) {
            let whole: ModPath = alias.iter().chain(&path[depth + 1..]).cloned().collect();
            return self.file_of(&whole, hops - 1);
        }
        let through = |glob: &ModPath| {
            let whole: ModPath = glob.iter().chain(&path[depth..]).cloned().collect();
            let has = |module: &Module| module.defined.contains(name);
            self.0.get(glob).is_some_and(has).then(|| self.file_of(&whole, hops - 1)).flatten()
        };
        module.globs.iter().find_map(through)
    }

    /// Returns the files that each file imports.
    fn imports(&self) -> BTreeMap<PathBuf, BTreeSet<PathBuf>> {
        let mut imports: BTreeMap<PathBuf, BTreeSet<PathBuf>> = BTreeMap::new();
        for (at, module) in &self.0 {
            let around: Vec<&PathBuf> =
                (0..=at.len()).filter_map(|depth| Some(&self.0.get(&at[..depth])?.file)).collect();
            let targets = imports.entry(module.file.clone()).or_default();
            let files = module.named.iter().filter_map(|path| self.file_of(path, MAX_HOPS));
            let files = files.filter(|file| around.iter().all(|outer| outer.as_path() != *file));
            targets.extend(files.map(Path::to_path_buf));
        }
        imports
    }
}

/// Collects the names that one module defines and uses.
struct Reader {
    at: ModPath,
    module: Module,
}

impl Reader {
    /// Returns a path relative to the crate's root; `None` if it leads out of the crate.
    fn absolute(&self, path: &[String]) -> Option<ModPath> {
        let (first, rest) = path.split_first()?;
        let (mut base, rest) = match first.as_str() {
            "crate" => (Vec::new(), rest),
            "self" => (self.at.clone(), rest),
            "super" => (self.at.split_last()?.1.to_vec(), rest),
            name if self.module.children.contains(name) => (self.at.clone(), path),
            name => (self.module.aliases.get(name)?.clone(), rest),
        };
        let mut rest = rest;
        while let Some(("super", after)) = rest.split_first().map(|(f, after)| (f.as_str(), after))
        {
            base.pop()?;
            rest = after;
        }
        base.extend_from_slice(rest);
        Some(base)
    }

    fn import(&mut self, tree: &UseTree, prefix: &mut ModPath, passes_on: bool) {
        let (name, alias) = match tree {
            UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.import(&path.tree, prefix, passes_on);
                prefix.pop();
                return;
            }
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.import(tree, prefix, passes_on));
                return;
            }
            UseTree::Glob(_) => {
                if let Some(path) = self.absolute(prefix) {
                    self.module.globs.push(path);
                }
                return;
            }
            UseTree::Name(name) => (name.ident.to_string(), name.ident.to_string()),
            UseTree::Rename(name) => (name.ident.to_string(), name.rename.to_string()),
        };
        let mut path = prefix.clone();
        let alias = match (name.as_str(), prefix.last()) {
            ("self", Some(last)) if alias == "self" => last.clone(),
            ("self", _) => alias,
            _ => {
                path.push(name);
                alias
            }
        };
        if let Some(path) = self.absolute(&path) {
            if !passes_on {
                self.module.named.push(path.clone());
            }
            self.module.aliases.insert(alias, path);
        }
    }
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item(&mut self, item: &'ast Item) {
        let name = match item {
            Item::Const(item) => Some(&item.ident),
            Item::Enum(item) => Some(&item.ident),
            Item::Fn(item) => Some(&item.sig.ident),
            Item::Static(item) => Some(&item.ident),
            Item::Struct(item) => Some(&item.ident),
            Item::Trait(item) => Some(&item.ident),
            Item::Type(item) => Some(&item.ident),
            Item::Union(item) => Some(&item.ident),
            Item::Macro(item) => item.ident.as_ref(),
            _ => None,
        };
        self.module.defined.extend(name.map(ToString::to_string));
        visit::visit_item(self, item);
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let passes_on = !matches!(item.vis, Visibility::Inherited);
        self.import(&item.tree, &mut Vec::new(), passes_on);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 {
            let names: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
            self.module.named.extend(self.absolute(&names));
        }
        visit::visit_path(self, path);
    }
}

fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let list = attribute.path().is_ident("cfg").then(|| attribute.meta.require_list().ok());
        list.flatten().is_some_and(|list| list.tokens.to_string() == "test")
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Mod(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Const(item) => &item.attrs,
        _ => &[],
    }
}

/// Returns the groups of nodes that are reachable from each other (strongly connected components).
fn circles<T: Ord + Clone>(graph: &BTreeMap<T, BTreeSet<T>>) -> Vec<Vec<T>> {
    let reach: BTreeMap<&T, BTreeSet<&T>> = graph.keys().map(|n| (n, reached(graph, n))).collect();
    let mut seen = BTreeSet::new();
    let mut found = Vec::new();
    for (node, reached) in &reach {
        if reached.contains(node) && seen.insert(*node) {
            let back = |other: &&&T| reach.get(*other).is_some_and(|theirs| theirs.contains(node));
            let circle: Vec<&T> = reached.iter().filter(back).copied().collect();
            seen.extend(&circle);
            found.push(circle.into_iter().cloned().collect());
        }
    }
    found
}

fn reached<'g, T: Ord>(graph: &'g BTreeMap<T, BTreeSet<T>>, from: &T) -> BTreeSet<&'g T> {
    let mut found = BTreeSet::new();
    let mut next: Vec<&T> = graph.get(from).into_iter().flatten().collect();
    while let Some(node) = next.pop() {
        if found.insert(node) {
            next.extend(graph.get(node).into_iter().flatten());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the cycles in a crate of these files.
    fn found(files: &[(&str, &str)]) -> Vec<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let mut modules = Modules::default();
        modules.read(&dir.path().join("lib.rs"), &[]).unwrap();
        let name = |file: PathBuf| file.strip_prefix(dir.path()).unwrap().display().to_string();
        let circles = circles(&modules.imports()).into_iter();
        circles.map(|circle| circle.into_iter().map(name).collect()).collect()
    }

    #[test]
    fn files_importing_each_other_are_reported() {
        let files = [
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::B; pub struct A(B);"),
            ("b.rs", "pub struct B; fn f() -> super::a::A { loop {} }"),
        ];
        assert_eq!(found(&files), [["a.rs", "b.rs"]]);
    }

    #[test]
    fn import_through_reexport_counts_for_defining_file() {
        let files = [
            ("lib.rs", "mod a; pub use a::{inner::I, A};"),
            (
                "a/mod.rs",
                "pub mod inner; pub use inner::I; use crate::a::inner::I as J; pub struct A(J);",
            ),
            ("a/inner.rs", "use crate::I; pub struct I(Option<Box<I>>);"),
        ];
        assert!(found(&files).is_empty(), "re-exports are no imports: {:?}", found(&files));
        let back = ("a/inner.rs", "use crate::A; pub struct I(Option<Box<A>>);");
        assert!(found(&[files[0], files[1], back]).is_empty(), "submodule may use its parent");
    }

    #[test]
    fn imports_in_unit_tests_and_mod_declarations_are_ignored() {
        let files = [
            ("lib.rs", "mod a; mod b;"),
            ("a.rs", "use crate::b::B; pub struct A(B);"),
            ("b.rs", "pub struct B; #[cfg(test)] mod tests { use crate::a::A; }"),
        ];
        assert!(found(&files).is_empty());
    }
}
