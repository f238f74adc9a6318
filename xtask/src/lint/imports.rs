//! Checks the imports between the files of a package: no circle of many files, and none against the flow.
//!
//! A file imports another if it names an item of it, in `use` or in a path. Code that is only for tests does not count.

use crate::tools;
use anyhow::{Context as _, Result, bail};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};
use syn::visit::{self, Visit};

/// The largest number of files that may depend on each other.
const CIRCLE_MOST: usize = 3;

/// The source folder of a package, with its modules in the order of the flow: a module may import from its own line and from lines before
/// it. Packages without an order are checked for circles only.
const PACKAGES: [(&str, &[&[&str]]); 13] = [
    (
        "sampler/src",
        &[
            &[
                "allocator",
                "engine_rules",
                "error",
                "collectors",
                "host_name",
                "host_root",
                "objects",
                "privileges",
                "wait_selector",
            ],
            &["config", "health", "query", "security"],
            &["inbox", "service_notify"],
            &["observe"],
            &["labels", "serving"],
            &["explain", "session", "freeze"],
            &["core_thread"],
            &["export"],
            &["reload", "otlp"],
            &["agent"],
            &["cli"],
            &["main"],
        ],
    ),
    (
        "sampler/core/src",
        &[
            &["units"],
            &["device", "cgroup_path", "pid_space", "experiment"],
            &["observation"],
            &["identity", "reconstruct"],
            &["fact"],
            &["snapshot"],
            &["attribute"],
            &["aggregate"],
            &["pipeline"],
        ],
    ),
    ("sampler/labels/src", &[]),
    ("sampler/session/src", &[]),
    ("sampler/report/src", &[]),
    ("sampler-common/src", &[]),
    ("sampler-ebpf/src", &[]),
    ("devkit/src", &[]),
    ("xtask/src", &[]),
    ("tests/support", &[]),
    ("tests/cuda-sim/src", &[]),
    ("tests/nvml-sim/src", &[]),
    ("benches", &[]),
];

/// The module path of a file; empty for the root of a package.
type Module = Vec<String>;
type Graph = BTreeMap<Module, BTreeSet<Module>>;

pub fn check() -> Result<()> {
    let mut problems = Vec::new();
    for (folder, order) in PACKAGES {
        let graph = graph(&tools::root().join(folder))?;
        for circle in circles(&graph).into_iter().filter(|circle| circle.len() > CIRCLE_MOST) {
            problems.push(format!("{folder}: {} files import each other", circle.len()));
            for module in &circle {
                let within = graph.get(module).into_iter().flatten().filter(|import| circle.contains(*import));
                let imports: Vec<String> = within.map(shown).collect();
                problems.push(format!("  {} imports {}", shown(module), imports.join(", ")));
            }
        }
        problems.extend(against_the_flow(&graph, order).into_iter().map(|problem| format!("{folder}: {problem}")));
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("{}", problems.join("\n"));
}

fn shown(module: &Module) -> String {
    if module.is_empty() { "(root)".into() } else { module.join("/") }
}

fn against_the_flow(graph: &Graph, order: &[&[&str]]) -> Vec<String> {
    let position = |module: &Module| {
        let top = module.first().map_or("main", String::as_str);
        order.iter().position(|line| line.contains(&top))
    };
    let mut problems = Vec::new();
    for (module, imports) in graph.iter().filter(|(module, _)| !order.is_empty() && !module.is_empty()) {
        let Some(own) = position(module) else {
            problems.push(format!("{} is missing in the flow; add it in xtask/src/lint/imports.rs", shown(module)));
            continue;
        };
        for import in imports.iter().filter(|import| position(import).is_some_and(|position| position > own)) {
            problems.push(format!("{} imports from {}, against the flow", shown(module), shown(import)));
        }
    }
    problems
}

fn graph(folder: &Path) -> Result<Graph> {
    let mut files = BTreeMap::new();
    collect(folder, &mut Vec::new(), &mut files)?;
    let modules: BTreeSet<Module> = files.keys().cloned().collect();
    let mut graph = Graph::new();
    for (module, path) in &files {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let file = syn::parse_file(&text).with_context(|| path.display().to_string())?;
        let mut finder = Finder { module: module.clone(), modules: &modules, found: BTreeSet::new() };
        finder.visit_file(&file);
        finder.found.remove(module);
        graph.insert(module.clone(), finder.found);
    }
    Ok(graph)
}

/// Source files by module, without those of tests.
fn collect(folder: &Path, module: &mut Module, files: &mut BTreeMap<Module, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let Some(name) = path.file_stem().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
        if matches!(name.as_str(), "tests" | "target" | "golden") {
            continue;
        }
        let is_root = matches!(name.as_str(), "mod" | "lib" | "main");
        if path.is_dir() || !is_root {
            module.push(name);
        }
        if path.is_dir() {
            collect(&path, module, files)?;
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.insert(module.clone(), path.clone());
        }
        if path.is_dir() || !is_root {
            module.pop();
        }
    }
    Ok(())
}

struct Finder<'a> {
    module: Module,
    modules: &'a BTreeSet<Module>,
    found: BTreeSet<Module>,
}

impl Finder<'_> {
    /// Records the file with the item that the path names: the longest prefix of the path that is a module.
    fn name(&mut self, path: &[String]) {
        let Some((first, rest)) = path.split_first() else { return };
        let (mut at, mut rest) = match first.as_str() {
            "crate" => (Module::new(), rest),
            "self" => (self.module.clone(), rest),
            "super" => (self.parent(&self.module), rest),
            // A child of this module.
            child => {
                let mut module = self.module.clone();
                module.push(child.to_owned());
                if !self.modules.contains(&module) {
                    return;
                }
                (module, rest)
            }
        };
        while rest.first().is_some_and(|part| part == "super") {
            at = self.parent(&at);
            rest = &rest[1..];
        }
        for part in rest {
            at.push(part.clone());
            if !self.modules.contains(&at) {
                at.pop();
                break;
            }
        }
        if self.modules.contains(&at) {
            self.found.insert(at);
        }
    }

    fn parent(&self, module: &Module) -> Module {
        module.split_last().map(|(_, parent)| parent.to_vec()).unwrap_or_default()
    }

    fn tree(&mut self, tree: &syn::UseTree, path: &mut Vec<String>) {
        match tree {
            syn::UseTree::Path(part) => {
                path.push(part.ident.to_string());
                self.tree(&part.tree, path);
                path.pop();
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|tree| self.tree(tree, path)),
            syn::UseTree::Name(name) => self.end(path, &name.ident),
            syn::UseTree::Rename(name) => self.end(path, &name.ident),
            syn::UseTree::Glob(_) => self.name(path),
        }
    }

    fn end(&mut self, path: &mut Vec<String>, name: &syn::Ident) {
        path.push(name.to_string());
        self.name(path);
        path.pop();
    }
}

fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|one| one.path().is_ident("cfg") && one.parse_args::<syn::Ident>().is_ok_and(|cfg| cfg == "test"))
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_for_tests(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_for_tests(&item.attrs) {
            self.tree(&item.tree, &mut Vec::new());
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        if parts.len() > 1 {
            self.name(&parts);
        }
        visit::visit_path(self, path);
    }
}

/// Files that can reach each other (strongly connected components). Plain reachability suffices for packages of some hundred files.
fn circles(graph: &Graph) -> Vec<BTreeSet<Module>> {
    let reach: BTreeMap<&Module, BTreeSet<&Module>> = graph.keys().map(|module| (module, reachable(graph, module))).collect();
    let mut circles: Vec<BTreeSet<Module>> = Vec::new();
    for (module, reached) in &reach {
        if circles.iter().any(|circle| circle.contains(*module)) {
            continue;
        }
        let back = |other: &&&Module| reach.get(**other).is_some_and(|reached| reached.contains(*module));
        let circle: BTreeSet<Module> = reached.iter().filter(back).map(|other| (*other).clone()).collect();
        if circle.len() > 1 {
            circles.push(circle);
        }
    }
    circles
}

fn reachable<'a>(graph: &'a Graph, from: &'a Module) -> BTreeSet<&'a Module> {
    let (mut reached, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(module) = next.pop() {
        for import in graph.get(module).into_iter().flatten() {
            if reached.insert(import) {
                next.push(import);
            }
        }
    }
    reached
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph_of(files: &[(&str, &str)]) -> Graph {
        let folder = std::env::temp_dir().join(format!("imports-{}-{}", std::process::id(), files.len()));
        for (name, text) in files {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let graph = graph(&folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        graph
    }

    #[test]
    fn uses_and_paths_count_as_imports_except_in_tests() {
        let graph = graph_of(&[
            ("main.rs", "mod a; mod b; mod c;"),
            ("a.rs", "use crate::b::{self, X as Y}; fn f() { crate::c::d::g(); }"),
            ("b.rs", "#[cfg(test)] mod tests { use crate::a::Z; }"),
            ("c/mod.rs", "pub use d::g; mod d;"),
            ("c/d.rs", "use super::super::b::X;"),
        ]);
        let imports = |name: &[&str]| -> Vec<String> {
            let module: Module = name.iter().map(|part| (*part).to_owned()).collect();
            graph[&module].iter().map(shown).collect()
        };
        assert_eq!(imports(&["a"]), ["b", "c/d"]);
        assert_eq!(imports(&["b"]), [""; 0]);
        assert_eq!(imports(&["c"]), ["c/d"]);
        assert_eq!(imports(&["c", "d"]), ["b"]);
    }

    #[test]
    fn circles_and_imports_against_the_flow_are_found() {
        let graph =
            graph_of(&[("a.rs", "use crate::b::X;"), ("b.rs", "use crate::c::X;"), ("c.rs", "use crate::a::X;"), ("d.rs", "")]);
        assert_eq!(circles(&graph).iter().map(BTreeSet::len).collect::<Vec<_>>(), [3]);
        let problems = against_the_flow(&graph, &[&["c"], &["b"], &["a"]]);
        assert_eq!(
            problems,
            ["c imports from a, against the flow", "d is missing in the flow; add it in xtask/src/lint/imports.rs"]
        );
    }
}
