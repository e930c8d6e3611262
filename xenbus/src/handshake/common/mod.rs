//! Keys common to all devices: addresses, states, errors, creation and removal.

mod addr;
mod create;
mod lifecycle;
mod queues;
mod status;

pub use addr::{
    BackendKind, DeviceAddr, DeviceClass, FrontendAddr, backend_root, frontend_root, list_backends,
    list_frontends, parse_frontend_path,
};
pub(super) use create::{check_frontend, create_backend_dir, create_frontend_dir};
pub use lifecycle::{
    announce_device_model, clear_revived, create_domain, domain_name, find_device, find_domain,
    is_revived, list_domains, record_for_libxl, remove_backend, remove_device, remove_domain,
    request_removal, revive_backends,
};
pub(super) use queues::{NUM_QUEUES, Used, read_count, read_each, write_each};
pub use status::{
    BackendPath, Hotplug, clear_error, error_path, hotplug_path, is_session_lost, online_path,
    read_backend_path, read_error, read_frontend_state, read_hotplug, read_online, read_state,
    state_path, switch_state, write_awaiting, write_error, write_hotplug, write_session_lost,
    write_state,
};
