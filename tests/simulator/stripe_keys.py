"""Top-level keys of real Stripe objects (vendored: github.com/stripe/openapi fixtures3.json, MIT, for the new shape;
recorded webhooks of github.com/stripe/sync-engine, Apache-2.0, and Stripe's changelog for the old one).

Left out: what came after 2025-03-31.basil (billing_mode, customer_account, managed_payments, ...), and `refunds` of a charge,
which is only there when expanded.
"""


def keys(text: str) -> set[str]:
    return set(text.split())


ENVELOPE = keys("""id object api_version created data livemode pending_webhooks request type""")
_SUBSCRIPTION = keys(
    """application application_fee_percent automatic_tax billing_cycle_anchor billing_cycle_anchor_config billing_thresholds
    cancel_at cancel_at_period_end canceled_at cancellation_details collection_method created currency customer
    days_until_due default_payment_method default_source default_tax_rates description discounts ended_at id
    invoice_settings items latest_invoice livemode metadata next_pending_invoice_item_invoice object on_behalf_of
    pause_collection payment_settings pending_invoice_item_interval pending_setup_intent pending_update schedule
    start_date status test_clock transfer_data trial_end trial_settings trial_start"""
)
_INVOICE = keys(
    """account_country account_name account_tax_ids amount_due amount_paid amount_remaining amount_shipping application
    attempt_count attempted auto_advance automatic_tax automatically_finalizes_at billing_reason collection_method created
    currency custom_fields customer customer_address customer_email customer_name customer_phone customer_shipping
    customer_tax_exempt customer_tax_ids default_payment_method default_source default_tax_rates description discounts
    due_date effective_at ending_balance footer from_invoice hosted_invoice_url id invoice_pdf issuer
    last_finalization_error latest_revision lines livemode metadata next_payment_attempt number object on_behalf_of
    payment_settings period_end period_start post_payment_credit_notes_amount pre_payment_credit_notes_amount
    receipt_number rendering shipping_cost shipping_details starting_balance statement_descriptor status
    status_transitions subtotal subtotal_excluding_tax test_clock total total_discount_amounts total_excluding_tax
    webhooks_delivered_at"""
)
_CHARGE = keys(
    """amount amount_captured amount_refunded application application_fee application_fee_amount balance_transaction
    billing_details calculated_statement_descriptor captured created currency customer description destination disputed
    failure_balance_transaction failure_code failure_message fraud_details id livemode metadata object on_behalf_of
    outcome paid payment_intent payment_method payment_method_details receipt_email receipt_number receipt_url refunded
    review shipping source source_transfer statement_descriptor statement_descriptor_suffix status transfer_data
    transfer_group"""
)
_INTENT = keys(
    """amount amount_capturable amount_details amount_received application application_fee_amount automatic_payment_methods
    canceled_at cancellation_reason capture_method client_secret confirmation_method created currency customer description
    id last_payment_error latest_charge livemode metadata next_action object on_behalf_of payment_method
    payment_method_configuration_details payment_method_options payment_method_types processing receipt_email review
    setup_future_usage shipping source statement_descriptor statement_descriptor_suffix status transfer_data
    transfer_group"""
)
_CUSTOMER = keys(
    """address balance created currency default_source delinquent description discount email id invoice_prefix
    invoice_settings livemode metadata name next_invoice_sequence object phone preferred_locales shipping tax_exempt
    test_clock"""
)
_REFUND = keys(
    """amount balance_transaction charge created currency destination_details id metadata object payment_intent reason
    receipt_number source_transfer_reversal status transfer_reversal"""
)
_DISPUTE = keys(
    """amount balance_transactions charge created currency evidence evidence_details id is_charge_refundable livemode
    metadata object payment_intent payment_method_details reason status"""
)
_PRODUCT = keys(
    """active created default_price description id images livemode marketing_features metadata name object package_dimensions
    shippable statement_descriptor tax_code type unit_label updated url"""
)
_PRICE = keys(
    """active billing_scheme created currency custom_unit_amount id livemode lookup_key metadata nickname object product
    recurring tax_behavior tiers_mode transform_quantity type unit_amount unit_amount_decimal"""
)
OLD_INVOICE = keys(
    """application_fee_amount charge discount paid paid_out_of_band payment_intent quote subscription subscription_details
    tax total_tax_amounts transfer_data"""
)
_SAME = {"customer": _CUSTOMER, "refund": _REFUND, "product": _PRODUCT, "price": _PRICE}
KEYS = {
    "2024-06-20": _SAME
    | {
        "subscription": _SUBSCRIPTION | {"current_period_start", "current_period_end", "discount", "plan", "quantity"},
        "invoice": _INVOICE | OLD_INVOICE,
        "charge": _CHARGE | {"invoice"},
        "payment_intent": _INTENT | {"invoice"},
        "dispute": _DISPUTE,
    },
    "2025-03-31.basil": _SAME
    | {
        "subscription": _SUBSCRIPTION,
        "invoice": _INVOICE | {"amount_overpaid", "parent", "total_pretax_credit_amounts", "total_taxes"},
        "charge": _CHARGE,
        "payment_intent": _INTENT,
        "dispute": _DISPUTE | {"enhanced_eligibility_types"},
    },
}
_ITEM = keys("""billing_thresholds created discounts id metadata object plan price quantity subscription tax_rates""")
ITEM_KEYS = {
    "2024-06-20": _ITEM,
    "2025-03-31.basil": _ITEM | {"current_period_start", "current_period_end"},
}
_LINE = keys(
    """amount currency description discount_amounts discountable discounts id invoice livemode metadata object period
    quantity"""
)
LINE_KEYS = {
    "2024-06-20": _LINE
    | keys(
        """amount_excluding_tax plan price proration proration_details subscription subscription_item tax_amounts tax_rates type
    unit_amount_excluding_tax"""
    ),
    "2025-03-31.basil": _LINE | {"parent", "pretax_credit_amounts", "pricing", "taxes"},
}
# the line of an invoice item names it, and no item of a subscription
ITEM_LINE_KEYS = {
    version: (known - {"subscription_item"}) | {"invoice_item"} if "subscription_item" in known else known
    for version, known in LINE_KEYS.items()
}
