//! What the operating system grants. A relay with many webhooks needs a descriptor for each connection.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit of open files to the highest that this process may have. What can't be raised stays.
pub fn raise_open_files() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| match soft < hard {
        true => setrlimit(Resource::RLIMIT_NOFILE, hard, hard),
        false => Ok(()),
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}
