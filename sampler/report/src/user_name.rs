//! The name of a container for people.

use std::fmt;

/// Characters of a container id, as `docker ps` prints it.
const SHORT_ID: usize = 12;

/// Displays as namespace/pod/container; without a pod as the container's name, else as the short container id, else as the cgroup path.
/// Unknown parts are empty. Tenants choose the names: see [`crate::terminal_safe`].
#[derive(Clone, Copy, Debug, Default)]
pub struct UserName<'a> {
    pub namespace: &'a str,
    pub pod: &'a str,
    pub container: &'a str,
    pub name: &'a str,
    pub container_id: &'a str,
    /// The cgroup path.
    pub id: &'a str,
}

impl fmt::Display for UserName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.pod.is_empty() {
            let parts = [self.namespace, self.pod, self.container].into_iter().filter(|part| !part.is_empty());
            return f.write_str(&parts.collect::<Vec<_>>().join("/"));
        }
        match [self.name, short_id(self.container_id)].into_iter().find(|part| !part.is_empty()) {
            Some(name) => f.write_str(name),
            None => f.write_str(self.id),
        }
    }
}

/// The beginning of a container id.
pub fn short_id(id: &str) -> &str {
    id.char_indices().nth(SHORT_ID).map_or(id, |(end, _)| &id[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_that_of_the_pod_or_the_container_or_its_id_or_its_path() {
        let id = "0123456789abcdef";
        let path = UserName { id: "/docker/1", ..UserName::default() };
        let bare = UserName { container_id: id, ..path };
        let docker = UserName { name: "web", ..bare };
        let pod = UserName { namespace: "prod", pod: "p", container: "c", ..docker };
        let cases = [
            (path, "/docker/1"),
            (bare, "0123456789ab"),
            (docker, "web"),
            (pod, "prod/p/c"),
            (UserName { container: "", ..pod }, "prod/p"),
        ];
        for (name, expect) in cases {
            assert_eq!(name.to_string(), expect);
        }
    }
}
