/* Prints the values of the headers: one "name value" per line, sizes and offsets in bytes. */
#include "xen_headers.h"

#define SIZE(name, type) printf(name " %zu\n", sizeof(type))
#define AT(name, type, field) printf(name "." #field " %zu\n", offsetof(type, field))
#define NUMBER(value) printf(#value " %lld\n", (long long)(value))
#define SLOTS(name)                                                                                \
    for (unsigned pages = 1; pages <= 32; pages++)                                                 \
        printf(#name "_slots_%u %u\n", pages, (unsigned)__CONST_RING_SIZE(name, pages * PAGE))

int main(void)
{
    SIZE("blk_request", struct blkif_request);
    AT("blk_request", struct blkif_request, operation);
    AT("blk_request", struct blkif_request, nr_segments);
    AT("blk_request", struct blkif_request, handle);
    AT("blk_request", struct blkif_request, id);
    AT("blk_request", struct blkif_request, sector_number);
    AT("blk_request", struct blkif_request, seg);
    SIZE("blk_segment", struct blkif_request_segment);
    AT("blk_segment", struct blkif_request_segment, gref);
    AT("blk_segment", struct blkif_request_segment, first_sect);
    AT("blk_segment", struct blkif_request_segment, last_sect);
    SIZE("blk_discard", struct blkif_request_discard);
    AT("blk_discard", struct blkif_request_discard, operation);
    AT("blk_discard", struct blkif_request_discard, flag);
    AT("blk_discard", struct blkif_request_discard, handle);
    AT("blk_discard", struct blkif_request_discard, id);
    AT("blk_discard", struct blkif_request_discard, sector_number);
    AT("blk_discard", struct blkif_request_discard, nr_sectors);
    SIZE("blk_indirect", struct blkif_request_indirect);
    AT("blk_indirect", struct blkif_request_indirect, operation);
    AT("blk_indirect", struct blkif_request_indirect, indirect_op);
    AT("blk_indirect", struct blkif_request_indirect, nr_segments);
    AT("blk_indirect", struct blkif_request_indirect, id);
    AT("blk_indirect", struct blkif_request_indirect, sector_number);
    AT("blk_indirect", struct blkif_request_indirect, handle);
    AT("blk_indirect", struct blkif_request_indirect, indirect_grefs);
    SIZE("blk_response", struct blkif_response);
    AT("blk_response", struct blkif_response, id);
    AT("blk_response", struct blkif_response, operation);
    AT("blk_response", struct blkif_response, status);
    SIZE("blk_slot", union blkif_sring_entry);
    AT("blk_sring", struct blkif_sring, req_prod);
    AT("blk_sring", struct blkif_sring, req_event);
    AT("blk_sring", struct blkif_sring, rsp_prod);
    AT("blk_sring", struct blkif_sring, rsp_event);
    AT("blk_sring", struct blkif_sring, ring);
    SLOTS(blkif);
    NUMBER(BLKIF_OP_READ);
    NUMBER(BLKIF_OP_WRITE);
    NUMBER(BLKIF_OP_WRITE_BARRIER);
    NUMBER(BLKIF_OP_FLUSH_DISKCACHE);
    NUMBER(BLKIF_OP_DISCARD);
    NUMBER(BLKIF_OP_INDIRECT);
    NUMBER(BLKIF_DISCARD_SECURE);
    NUMBER(BLKIF_MAX_SEGMENTS_PER_REQUEST);
    NUMBER(BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST);
    NUMBER(BLKIF_RSP_OKAY);
    NUMBER(BLKIF_RSP_ERROR);
    NUMBER(BLKIF_RSP_EOPNOTSUPP);
    NUMBER(VDISK_CDROM);
    NUMBER(VDISK_REMOVABLE);
    NUMBER(VDISK_READONLY);

    SIZE("tx_request", struct netif_tx_request);
    AT("tx_request", struct netif_tx_request, gref);
    AT("tx_request", struct netif_tx_request, offset);
    AT("tx_request", struct netif_tx_request, flags);
    AT("tx_request", struct netif_tx_request, id);
    AT("tx_request", struct netif_tx_request, size);
    SIZE("tx_response", struct netif_tx_response);
    AT("tx_response", struct netif_tx_response, id);
    AT("tx_response", struct netif_tx_response, status);
    SIZE("tx_slot", union netif_tx_sring_entry);
    AT("tx_sring", struct netif_tx_sring, ring);
    SLOTS(netif_tx);
    SIZE("rx_request", struct netif_rx_request);
    AT("rx_request", struct netif_rx_request, id);
    AT("rx_request", struct netif_rx_request, gref);
    SIZE("rx_response", struct netif_rx_response);
    AT("rx_response", struct netif_rx_response, id);
    AT("rx_response", struct netif_rx_response, offset);
    AT("rx_response", struct netif_rx_response, flags);
    AT("rx_response", struct netif_rx_response, status);
    SIZE("rx_slot", union netif_rx_sring_entry);
    AT("rx_sring", struct netif_rx_sring, ring);
    SLOTS(netif_rx);
    SIZE("extra", struct netif_extra_info);
    AT("extra", struct netif_extra_info, type);
    AT("extra", struct netif_extra_info, flags);
    AT("extra", struct netif_extra_info, u.gso.size);
    AT("extra", struct netif_extra_info, u.gso.type);
    AT("extra", struct netif_extra_info, u.mcast.addr);
    AT("extra", struct netif_extra_info, u.hash.type);
    AT("extra", struct netif_extra_info, u.hash.algorithm);
    AT("extra", struct netif_extra_info, u.hash.value);
    NUMBER(NETTXF_csum_blank);
    NUMBER(NETTXF_data_validated);
    NUMBER(NETTXF_more_data);
    NUMBER(NETTXF_extra_info);
    NUMBER(NETRXF_data_validated);
    NUMBER(NETRXF_csum_blank);
    NUMBER(NETRXF_more_data);
    NUMBER(NETRXF_extra_info);
    NUMBER(NETRXF_gso_prefix);
    NUMBER(NETIF_RSP_DROPPED);
    NUMBER(NETIF_RSP_ERROR);
    NUMBER(NETIF_RSP_OKAY);
    NUMBER(NETIF_RSP_NULL);
    NUMBER(XEN_NETIF_NR_SLOTS_MIN);
    NUMBER(XEN_NETIF_MAX_TX_SIZE);
    NUMBER(XEN_NETIF_EXTRA_TYPE_GSO);
    NUMBER(XEN_NETIF_EXTRA_TYPE_MCAST_ADD);
    NUMBER(XEN_NETIF_EXTRA_TYPE_MCAST_DEL);
    NUMBER(XEN_NETIF_EXTRA_TYPE_HASH);
    NUMBER(XEN_NETIF_EXTRA_FLAG_MORE);
    NUMBER(XEN_NETIF_GSO_TYPE_TCPV4);
    NUMBER(XEN_NETIF_GSO_TYPE_TCPV6);

    SIZE("ctrl_request", struct xen_netif_ctrl_request);
    AT("ctrl_request", struct xen_netif_ctrl_request, id);
    AT("ctrl_request", struct xen_netif_ctrl_request, type);
    AT("ctrl_request", struct xen_netif_ctrl_request, data);
    SIZE("ctrl_response", struct xen_netif_ctrl_response);
    AT("ctrl_response", struct xen_netif_ctrl_response, id);
    AT("ctrl_response", struct xen_netif_ctrl_response, type);
    AT("ctrl_response", struct xen_netif_ctrl_response, status);
    AT("ctrl_response", struct xen_netif_ctrl_response, data);
    SIZE("ctrl_slot", union xen_netif_ctrl_sring_entry);
    SIZE("gref", struct xen_netif_gref);
    AT("gref", struct xen_netif_gref, ref);
    AT("gref", struct xen_netif_gref, flags);
    AT("gref", struct xen_netif_gref, status);
    SLOTS(xen_netif_ctrl);
    NUMBER(XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS);
    NUMBER(XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS);
    NUMBER(XEN_NETIF_CTRL_TYPE_SET_HASH_KEY);
    NUMBER(XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE);
    NUMBER(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE);
    NUMBER(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING);
    NUMBER(XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM);
    NUMBER(XEN_NETIF_CTRL_TYPE_GET_GREF_MAPPING_SIZE);
    NUMBER(XEN_NETIF_CTRL_TYPE_ADD_GREF_MAPPING);
    NUMBER(XEN_NETIF_CTRL_TYPE_DEL_GREF_MAPPING);
    NUMBER(XEN_NETIF_CTRL_STATUS_SUCCESS);
    NUMBER(XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED);
    NUMBER(XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER);
    NUMBER(XEN_NETIF_CTRL_STATUS_BUFFER_OVERFLOW);
    NUMBER(XEN_NETIF_CTRL_HASH_TYPE_IPV4);
    NUMBER(XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP);
    NUMBER(XEN_NETIF_CTRL_HASH_TYPE_IPV6);
    NUMBER(XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP);
    NUMBER(_XEN_NETIF_CTRL_HASH_TYPE_IPV4);
    NUMBER(_XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP);
    NUMBER(_XEN_NETIF_CTRL_HASH_TYPE_IPV6);
    NUMBER(_XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP);
    NUMBER(XEN_NETIF_CTRL_HASH_ALGORITHM_NONE);
    NUMBER(XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ);
    NUMBER(XEN_NETIF_CTRLF_GREF_readonly);
    for (unsigned len = 0; len <= 36; len += 4) {
        uint8_t key[40], data[36];
        for (unsigned i = 0; i < sizeof(key); i++)
            key[i] = i * 37 + 11;
        for (unsigned i = 0; i < sizeof(data); i++)
            data[i] = i * 91 + 5;
        printf("toeplitz_%u %u\n", len, xen_netif_toeplitz_hash(key, sizeof(key), data, len));
    }

    SIZE("grant", struct grant_entry_v1);
    AT("grant", struct grant_entry_v1, flags);
    AT("grant", struct grant_entry_v1, domid);
    AT("grant", struct grant_entry_v1, frame);
    NUMBER(GTF_permit_access);
    NUMBER(GTF_type_mask);
    NUMBER(GTF_readonly);
    NUMBER(GTF_reading);
    NUMBER(GTF_writing);
    NUMBER(GNTTAB_NR_RESERVED_ENTRIES);
    NUMBER(DOMID_FIRST_RESERVED);
    NUMBER(DOMID_SELF);

    SIZE("console", struct xencons_interface);
    AT("console", struct xencons_interface, in);
    AT("console", struct xencons_interface, out);
    AT("console", struct xencons_interface, in_cons);
    AT("console", struct xencons_interface, in_prod);
    AT("console", struct xencons_interface, out_cons);
    AT("console", struct xencons_interface, out_prod);
    AT("xenstore", struct xenstore_domain_interface, req);
    AT("xenstore", struct xenstore_domain_interface, rsp);
    AT("xenstore", struct xenstore_domain_interface, req_cons);
    AT("xenstore", struct xenstore_domain_interface, req_prod);
    AT("xenstore", struct xenstore_domain_interface, rsp_cons);
    AT("xenstore", struct xenstore_domain_interface, rsp_prod);
    AT("xenstore", struct xenstore_domain_interface, server_features);
    AT("xenstore", struct xenstore_domain_interface, connection);
    AT("xenstore", struct xenstore_domain_interface, error);
    NUMBER(XENSTORE_RING_SIZE);
    return 0;
}
